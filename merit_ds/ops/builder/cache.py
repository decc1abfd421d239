# SPDX-License-Identifier: Apache-2.0
"""Where compiled kernels are kept, and how processes that want the same one take turns."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merit_ds.ops.builder.toolchain import BuildError


def cache_folder() -> Path:
    """`merit_ds` below `TORCH_EXTENSIONS_DIR`, or below PyTorch's default for it in the user's cache.

    Raises:
        BuildError: the user has no home directory.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root).absolute() / "merit_ds"
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions" / "merit_ds"
    except RuntimeError:
        raise BuildError("no home directory to keep kernels in: set TORCH_EXTENSIONS_DIR to a folder") from None


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no other process of this node is between here and the end of the block with the same path.

    The kernel drops an flock with the process that holds it. A file whose mere existence is the lock, as PyTorch's
    extensions use it, outlives a killed process, and every later one waits for ever. The file is never removed: a
    process that waits for the old file and one that makes a new file would both go on.
    """
    with path.open("w") as file:
        # Some network file systems have no locks. Each process then compiles, and the last one's library stays.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
