# SPDX-License-Identifier: Apache-2.0
"""PREFIX.json: what prepared data consists of, and whether the files beside it are still that.

PREFIX_train.bin/.idx    PREFIX_valid.bin/.idx    Megatron-core's IndexedDataset, one for each split
PREFIX.json              written last: without it there is no prepared data
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from merit_ds.errors import InputError
from merit_ds.training.config import Section
from merit_ds.training.documents import Split
from merit_ds.training.manifest import fingerprint

SPLITS: tuple[Split, ...] = ("train", "valid")
HASH_AT_START_BYTES = 2**30
"""A larger .bin is checked by its size at start-up; `python -m merit_ds.training.data verify` reads all of it."""


class FileEntry(Section):
    """One file as it was written."""

    bytes: int
    sha256: str


class SplitEntry(Section):
    """One side of the split: documents, tokens (end-of-document tokens included), and its two files."""

    documents: int
    tokens: int
    bin: FileEntry
    idx: FileEntry


class DataManifest(Section):
    """The contents of PREFIX.json."""

    format: Literal[1] = 1
    source: str
    tokenizer: str
    vocab_size: int
    train: SplitEntry
    valid: SplitEntry

    def split(self, name: Split) -> SplitEntry:
        """The entry of one side."""
        return self.train if name == "train" else self.valid


def split_prefix(prefix: str, split: str) -> str:
    """The path of a split's files without their suffix, as Megatron-core names datasets."""
    return f"{prefix}_{split}"


def output_paths(prefix: str) -> list[Path]:
    """Every file of prepared data, PREFIX.json last."""
    files = [Path(split_prefix(prefix, split) + suffix) for split in SPLITS for suffix in (".bin", ".idx")]
    return [*files, Path(f"{prefix}.json")]


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file."""
    size, sha256 = fingerprint(path)
    return FileEntry(bytes=size, sha256=sha256)


def read_manifest(prefix: str, *, tokenizer: str = "gpt2") -> DataManifest:
    """Read PREFIX.json.

    Args:
        tokenizer: for that command, where the data is missing.

    Raises:
        InputError: there is none (names the command that prepares data), or it is damaged.
    """
    path = Path(f"{prefix}.json")
    try:
        return DataManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        source = "openwebtext --workers 32" if Path(prefix).name == "openwebtext" else "wiki"
        raise InputError(
            f"{path}: no prepared data ({error.strerror}); make it with `python -m merit_ds.training.data`, "
            f"for instance: python -m merit_ds.training.data {source} --output {prefix} --tokenizer {tokenizer}"
        ) from None
    except (UnicodeDecodeError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not UTF-8"
        raise InputError(f"{path}: damaged or of another version ({problem}); prepare the data again") from None


def verify_files(prefix: str, manifest: DataManifest, *, hash_up_to: int | None = None) -> None:
    """Check that the files are those of the manifest.

    Args:
        prefix: the data's path prefix.
        manifest: what read_manifest returned.
        hash_up_to: larger `.bin` files are checked by size only; None: all are hashed. The `.idx` always is,
            because Megatron-core follows its numbers without checking them.

    Raises:
        InputError: a file is missing, of another size, or of other contents.
    """
    for split in SPLITS:
        side = manifest.split(split)
        for suffix, entry in ((".idx", side.idx), (".bin", side.bin)):
            path = Path(split_prefix(prefix, split) + suffix)
            if not path.is_file():
                raise InputError(f"{path}: missing, although {prefix}.json names it; prepare the data again")
            if (size := path.stat().st_size) != entry.bytes:
                raise InputError(
                    f"{path}: {size:,} bytes instead of {entry.bytes:,}; it is truncated or another file: "
                    "prepare the data again"
                )
            hashed = suffix == ".idx" or hash_up_to is None or size <= hash_up_to
            if hashed and describe_file(path) != entry:
                raise InputError(f"{path}: corrupt, its sha256 is not that of {prefix}.json; prepare the data again")
