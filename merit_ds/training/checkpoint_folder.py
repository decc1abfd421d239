# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint folder on the disk: what is complete in it, committing a checkpoint, removing old ones.

One process calls these functions, and no other may write there meanwhile; `merit_ds.training.checkpoint` is what all
ranks call together. A rename commits a checkpoint: whatever has no checkpoint's name, or does not match its manifest,
is none.
"""

import itertools
import logging
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from merit_ds.training.manifest import Manifest, fingerprint, read_manifest, sync, write_manifest

UNFINISHED = "unfinished_checkpoint"
"""Begins a temporary name: of a checkpoint that is being written, or of one that is being removed.

A random number ends it. Another host's NFS client may take a name for the folder that it meant a minute ago, and that
may be a finished checkpoint by now.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    manifest: Manifest


def read_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints in `folder` whose manifests can be read, newest first, and a line for each other one.

    Their files are not compared with the manifests.
    """
    checkpoints, problems = [], []
    for path in sorted(folder.glob("global_step*")):
        try:
            checkpoints.append(Checkpoint(path, read_manifest(path)))
        except ValueError as error:
            problems.append(str(error))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.manifest.sequence, reverse=True), problems


def begin(folder: Path) -> Path:
    """Make an empty folder under a new temporary name, and remove those that were left behind."""
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)  # what is in use elsewhere goes another time
    unfinished = _temporary(folder)
    unfinished.mkdir(parents=True)
    return unfinished


def next_sequence(folder: Path) -> int:
    """The sequence number of the next checkpoint in `folder`."""
    return 1 + max((checkpoint.manifest.sequence for checkpoint in read_checkpoints(folder)[0]), default=0)


def file_names(checkpoint: Path) -> list[str]:
    """Every file below the folder `checkpoint`, relative to it."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def flush_and_hash(checkpoint: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Flush these of its files to the disk; each one's size and sha256."""
    hashes = {}
    for name in names:
        sync(checkpoint / name)
        hashes[name] = fingerprint(checkpoint / name)
    return hashes


def commit(folder: Path, written: Path, manifest: Manifest) -> Path:
    """Write the manifest into `written`, a folder somewhere below `folder`, and give it a checkpoint's name.

    Returns:
        `folder/global_step{N}`, with `_universal` behind it for such a checkpoint, and with a number behind that where
        the name is taken.
    """
    for inner in (path for path in written.rglob("*") if path.is_dir()):
        sync(inner)
    write_manifest(written, manifest)
    path = next(path for path in _names(folder, manifest) if not path.exists())
    written.rename(path)
    sync(folder)
    return path


def shortage(folder: Path) -> str:
    """What a person needs to know where writing a checkpoint into `folder` has failed: is there room for one?"""
    free = f"{shutil.disk_usage(folder).free / 1e9:.3f} GB are free there"
    before = read_checkpoints(folder)[0]
    if not before:
        return f"{free}: is the disk full, or a quota used up?"
    size = sum(size for size, _ in before[0].manifest.files.values())
    return f"{free} and {before[0].path.name} has {size / 1e9:.3f} GB: is the disk full, or a quota used up?"


def remove_old(folder: Path, *, keep: int, damaged: Collection[Path] = ()) -> None:
    """Remove all but the `keep` newest checkpoints; one that cannot be removed gets a warning.

    Args:
        damaged: resolved paths of checkpoints that do not match their manifests: they stay, and do not count.
    """
    whole = [one for one in read_checkpoints(folder)[0] if one.path.resolve() not in damaged]
    try:
        for checkpoint in whole[keep:]:
            # Renamed first: a kill half-way must not leave half a checkpoint under a complete one's name.
            shutil.rmtree(checkpoint.path.rename(_temporary(folder)))
    except OSError as error:
        logger.warning("%s: cannot remove an old checkpoint: %s", error.filename, error.strerror)


def _temporary(folder: Path) -> Path:
    return folder / f"{UNFINISHED}_{secrets.token_hex(8)}"


def _names(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A name that is taken, by a damaged checkpoint or by an earlier run's, is never reused."""
    name = f"global_step{manifest.step}" + "_universal" * manifest.universal
    yield folder / name
    for number in itertools.count(2):
        yield folder / f"{name}_{number}"
