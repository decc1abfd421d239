# SPDX-License-Identifier: Apache-2.0
"""Who works on a run, and how long it took: locks, and `attempts.jsonl`.

A lock is an flock on a file in the run's folder. The trainer inherits it, so it is held as long as either lives: a run
whose lab was killed is still taken while its trainer goes on. The kernel frees it when they end in whatever way.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError

ATTEMPTS = "attempts.jsonl"


def try_lock(folder: Path) -> int | None:
    """Take a run's lock; returns its file descriptor, or None where another process has it.

    The run is free again once every process that inherited the descriptor has closed it.

    Raises:
        InputError: the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(3):
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder / "lock")
            return descriptor
        except BlockingIOError:
            time.sleep(0.02)  # `is_locked` of another process may hold it, for much less
        except InputError:
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def is_locked(folder: Path) -> bool:
    """Whether some process works on the run."""
    if not (folder / "lock").exists():
        return False
    descriptor = try_lock(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock at `path`, and hold it while entered."""
    with path.open("w") as file:
        _flock(file.fileno(), fcntl.LOCK_EX, path)
        yield


def _flock(descriptor: int, how: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise InputError(
            f"{path}: its file system has no flock ({error.strerror}), without which two processes could do one run; "
            "give an --output on another, or have it mounted with locks (Lustre: -o flock, not localflock)"
        ) from None


def begin_attempt(folder: Path, *, log: Path, ranks: int) -> None:
    """Note that a trainer of so many ranks starts now; the one before may have been killed together with its lab."""
    end_attempt(folder, log=log)
    _append(folder, {"start": time.time(), "ranks": ranks})


def ranks_before(folder: Path) -> int | None:
    """Ranks of the last attempt; None where there was none."""
    starts = [row for row in _read(folder) if "start" in row]
    return starts[-1].get("ranks") if starts else None


def end_attempt(folder: Path, *, log: Path, killed: str | None = None) -> None:
    """Note that the run's trainer has ended, with its last word in the log: perhaps long ago.

    Args:
        killed: the signal that ended it from outside, as far as that was seen.
    """
    rows = _read(folder)
    if rows and "start" in rows[-1]:
        latest = folder / "latest"
        how = {"killed": killed, "checkpoint": latest.read_text() if latest.exists() else None} if killed else {}
        _append(folder, {"end": max(log.stat().st_mtime, rows[-1]["start"])} | how)


def note_retry(folder: Path) -> None:
    """Note that the run is done again though it had failed: its kills so far no longer count."""
    if (folder / ATTEMPTS).exists():
        _append(folder, {"retry": time.time()})


def kills_in_a_row(folder: Path) -> int:
    """Last attempts that ended by SIGKILL, which nobody sends to stop a run, with the same newest checkpoint."""
    ends = [row for row in _read(folder) if "start" not in row]
    alike = takewhile(
        lambda row: row.get("killed") == "SIGKILL" and row["checkpoint"] == ends[-1]["checkpoint"], ends[::-1]
    )
    return len(list(alike))


def wall_seconds(folder: Path) -> float:
    """Seconds in which a trainer worked on the run, interrupted attempts included."""
    rows = _read(folder)
    starts = [row["start"] for row in rows if "start" in row]
    ends = [row["end"] for row in rows if "end" in row]
    return round(float(sum(end - start for start, end in zip(starts, ends, strict=False))), 1)


def _append(folder: Path, row: dict[str, Any]) -> None:
    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / ATTEMPTS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
