# SPDX-License-Identifier: Apache-2.0
"""Writes documents as Megatron-core datasets: all of PREFIX's files, or none.

Documents keep the order of their source. A shuffle here would change nothing: each split has its own files, and
GPTDataset shuffles documents and then sequences of every epoch by the run's seed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.training.data_manifest import (
    SPLITS,
    DataManifest,
    SplitEntry,
    describe_file,
    output_paths,
    split_prefix,
)
from merit_ds.training.documents import Source, Split
from merit_ds.training.encode import Encoder, encode_all


def prepare(source: Source, encoder: Encoder, *, prefix: str, workers: int, overwrite: bool) -> DataManifest:
    """Tokenize a source into PREFIX_train.bin/.idx, PREFIX_valid.bin/.idx and PREFIX.json.

    Memory is bounded by the batches in flight, except for Megatron-core's index: about 130 bytes a document.

    Args:
        source: the documents.
        encoder: tokenizer and split.
        prefix: path prefix of the output; its folder is created.
        workers: tokenizing processes; the output does not depend on it.
        overwrite: replace existing output, at the very end.

    Returns:
        What was written.

    Raises:
        InputError: output exists, another process is writing it, or a side of the split would be empty.
    """
    finals = output_paths(prefix)
    # Without its manifest the output of a killed run is nobody's data.
    if not overwrite and finals[-1].exists():
        raise InputError(f"{finals[-1]}: exists; choose another --output or replace it with --overwrite")
    with _partial_folder(Path(f"{prefix}.partial")) as folder:
        partial = str(folder / Path(prefix).name)
        manifest = _write(source, encoder, partial, workers)
        partials = output_paths(partial)
        partials[-1].write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # The manifest goes first and comes last: a kill between two renames leaves no data that passes for complete.
        finals[-1].unlink(missing_ok=True)
        for partial_path, final in zip(partials, finals, strict=True):
            os.replace(partial_path, final)
    return manifest


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A locked folder beside the output, gone at the end; one that a killed run left behind is used again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot write here: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"{folder}: another process is preparing this output; wait for it") from None
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        os.close(lock)


def _write(source: Source, encoder: Encoder, prefix: str, workers: int) -> DataManifest:
    # Imported here: it takes seconds, which neither --help nor the worker processes should wait for.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = encoder.tokenizer
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {split: IndexedDatasetBuilder(f"{split_prefix(prefix, split)}.bin", dtype=dtype) for split in SPLITS}
    documents = dict.fromkeys(SPLITS, 0)
    tokens = dict.fromkeys(SPLITS, 0)
    bar = tqdm(total=source.total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar:
        for encoded in encode_all(source.documents, encoder, workers=workers):
            length = len(encoded.tokens)
            builders[encoded.split].add_document(encoded.tokens, [length])
            documents[encoded.split] += 1
            tokens[encoded.split] += length
            bar.update(encoded.size)
    # GPTDataset loops for ever on an empty split.
    _check_sides(documents)
    sides: dict[Split, SplitEntry] = {}
    for split, builder in builders.items():
        path = split_prefix(prefix, split)
        builder.finalize(f"{path}.idx")
        files = {kind: describe_file(Path(f"{path}.{kind}")) for kind in ("bin", "idx")}
        sides[split] = SplitEntry(documents=documents[split], tokens=tokens[split], **files)
    return DataManifest(
        source=source.description,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        train=sides["train"],
        valid=sides["valid"],
    )


def _check_sides(documents: dict[Split, int]) -> None:
    total = sum(documents.values())
    if total == 0:
        raise InputError("the source holds no documents with text; nothing was written")
    for split, number in documents.items():
        if number == 0:
            raise InputError(
                f"no document of {total:,} fell on the {split} side, and both sides need one; change --valid-fraction "
                "or --seed, or give more documents (--blank-lines cuts a text file into many)"
            )
