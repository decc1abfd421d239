# SPDX-License-Identifier: Apache-2.0
"""What makes a checkpoint complete: `manifest.json`, the list of its files with their sizes and sha256.

It is plain JSON with a sha256 of itself, so reading it runs no code and a damaged one is recognised.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds and which run can take it."""

    sequence: int
    """1 for the folder's first checkpoint, then one more each: tells the newest, also when steps start over."""
    step: int
    """Optimizer steps that were done."""
    zero_stage: int
    """For the reader: stages 1 and 2 load each other's checkpoints, and `setup` tells them from 0."""
    setup: dict[str, Any]
    """What decides the shards' layout and content: numbers of ranks, precision, optimizer, DeepSpeed's wrapper, and
    whether there is a learning-rate schedule."""
    model: dict[str, Any]
    """The model's settings, as JSON has them."""
    files: dict[str, tuple[int, str]]
    """Path within the checkpoint to size in bytes and sha256."""
    universal: bool = False
    """Whether it holds whole parameters, which any number of ranks can load, in place of one run's shards."""

    def plain(self) -> dict[str, Any]:
        """Its fields, as JSON gives them back."""
        return asdict(self) | {"files": {name: list(entry) for name, entry in self.files.items()}}

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "Manifest":
        """The manifest whose `plain` this is."""
        return cls(**content | {"files": {name: (size, sha256) for name, (size, sha256) in content["files"].items()}})


def fingerprint(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of the file at `path`.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(path: Path, expected: tuple[int, str]) -> str | None:
    """Why the file at `path` is not the one that was saved, or None. Compares the size before it reads the content."""
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"{path}: {size} bytes where {expected[0]} were written"
        if fingerprint(path) != expected:
            return f"{path}: its sha256 is not the one that was written"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder `checkpoint`, and flush both to the disk."""
    content = {"format": FORMAT, **manifest.plain()}
    write_text(checkpoint / MANIFEST, json.dumps({**content, "sha256": _own_sha256(content)}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> Manifest:
    """Read `manifest.json` from the folder `checkpoint`.

    Raises:
        ValueError: it is missing, damaged or of another format; one line that names the file.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, so the checkpoint is not complete") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: not the JSON that was written") from None
    if own != _own_sha256(content):
        raise ValueError(f"{path}: its content does not match its own sha256")
    if content.pop("format") != FORMAT:
        raise ValueError(f"{path}: of another format than {FORMAT}, the one that this version reads")
    return Manifest.from_plain(content)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`: after a crash it holds the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk: a power failure may otherwise undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
