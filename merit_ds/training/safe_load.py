# SPDX-License-Identifier: Apache-2.0
"""Reading DeepSpeed's checkpoint files without running code that may be in them.

They are pickles, and a pickle may call any function. DeepSpeed's own loading and its converter permit that: they pass
`weights_only=False`. Within `no_code` torch's restricted unpickler reads their files all the same: it builds tensors,
plain data and the classes listed here, and refuses the rest before anything of it is called.
"""

import copyreg
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from merit_ds.errors import InputError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's documented switch: `torch.load` then ignores its caller's `weights_only=False`."""


@contextmanager
def no_code(path: Path) -> Iterator[None]:
    """Within it, every `torch.load` of this process and of its forks reads data only; DeepSpeed's calls too.

    Args:
        path: the file that is read, or the folder of such files: where one is refused, it is named.

    Raises:
        InputError: a file holds something else. Nothing of it was called.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with _known_classes():
            yield
    except UnpicklingError:
        files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
        found = next(filter(None, map(_find_other, files)), f"{path}: holds more than data")
        raise InputError(f"{found}: refused, and nothing of it was run; load what your own run wrote") from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def read(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote to the file at `path`, on the CPU.

    Args:
        mmap: leave the tensors' content on the disk until it is used.

    Raises:
        InputError: as `no_code`.
    """
    with no_code(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def stage_as_number() -> None:
    """From now on pickle DeepSpeed's ZeRO stage as its class and number, whatever this Python makes of an enum.

    3.11.2, which is Debian 12's, writes a call of `getattr`, and that may not be allowed.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def refuse_other(path: Path) -> None:
    """Look whether the file at `path`, newly saved, can be read again; files that are not `*.pt` pass.

    Raises:
        InputError: it holds what `no_code` refuses.
    """
    found = _find_other(path) if path.suffix == ".pt" else None
    if found:
        raise InputError(f"{found}, which is no data, so it could not be loaded again")


def refuse_extra_state(checkpoint: Path) -> None:
    """Look whether a checkpoint's weights come with states that Transformer Engine would unpickle out of plain bytes.

    They are for FP8, which the trainer does not use, so its own are empty.

    Raises:
        InputError: one is not empty. Nothing of it was unpickled.
    """
    for path in sorted(checkpoint.rglob("mp_rank_*_model_states.pt")):
        for name, value in read(path, mmap=True)["module"].items():
            empty = value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)
            if name.endswith("_extra_state") and not empty:
                raise InputError(
                    f"{path}: {name} is not empty, and Transformer Engine would unpickle it: refused, and nothing "
                    "of it was run; load what your own run wrote"
                )


def _find_other(file: Path) -> str | None:
    """A line that names what the file holds beyond data and the known classes, found without loading it."""
    try:
        with _known_classes():
            names = get_unsafe_globals_in_checkpoint(file)
    except UnpicklingError as error:
        return f"{file}: holds a pickle that torch does not write ({error})"
    except (ValueError, RuntimeError, OSError):
        return None  # not in torch's zip format, or damaged
    return f"{file}: holds {', '.join(sorted(names))}" if names else None


@contextmanager
def _known_classes() -> Iterator[None]:
    """Allow DeepSpeed's classes in the files of each stage, precision and wrapper that the trainer takes.

    None of them does anything when it is constructed but keep what it is given.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # Leaving `safe_globals` forbids what it was given, also where an outer one, or the caller, had allowed it.
    with safe_globals([kind for kind in known if kind not in get_safe_globals()]):
        yield
