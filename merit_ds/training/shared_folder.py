# SPDX-License-Identifier: Apache-2.0
"""Looking for what another host has just written into a shared folder."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

VISIBLE_SECONDS = 65.0
"""An NFS client may go on answering from its cache for 60 s (acdirmax), that a name is not there for instance."""


def appears(seen: Callable[[], bool], folder: Path, *, seconds: float) -> bool:
    """Wait until `seen` is true of what another host writes below `folder`; False where it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            # Opening a folder makes NFS ask the server, where a look at one name may be answered from the cache.
            list(next(path for path in (folder, *folder.parents) if path.exists()).iterdir())
            if seen():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
