# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed JSON's top-level keys: DeepSpeed ignores one that it does not know, a misspelt one too."""

import difflib
import logging
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from merit_ds.errors import InputError

logger = logging.getLogger(__name__)


class _Asked(dict[str, Any]):
    """An empty JSON that notes the keys which its reader looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return default

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return False

    def keys(self) -> Any:
        return self


def known_keys() -> set[str]:
    """What this version of DeepSpeed looks for in a JSON: it has no list of it, so its reader is given an empty one."""
    asked = _Asked()
    DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(asked)
    return asked.names


def check_keys(ds_config: dict[str, Any], *, path: str, quiet: bool = False) -> None:
    """Refuse a key that resembles one of DeepSpeed's, and warn of the others that it does not know.

    A name that begins with _ is a comment.

    Args:
        path: of the JSON, for the message.
        quiet: another rank warns.

    Raises:
        InputError: a key is misspelt.
    """
    known = known_keys()
    strange = [key for key in ds_config if key not in known and not key.startswith("_")]
    for key in strange:
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
        if near:
            raise InputError(f"{path}: DeepSpeed has no key {key!r} and would ignore it; did you mean {near[0]!r}?")
    if strange and not quiet:
        logger.warning("%s: DeepSpeed does not know these keys, and ignores them: %s", path, ", ".join(strange))
