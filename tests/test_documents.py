# SPDX-License-Identifier: Apache-2.0
"""Each source of text: what counts as a document, and what is said about input that cannot be used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from merit_ds.errors import InputError
from merit_ds.training import documents
from merit_ds.training.documents import Source, json_lines, nanogpt, openwebtext, text_files, wikipedia


def texts(source: Source) -> list[str]:
    return [str(document.content) for document in source.documents]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", "Été\n\nzwei\n".encode()), write(tmp_path / "b", b"three")]
    source = text_files(paths)
    assert texts(source) == ["Été\n\nzwei\n", "three"]
    assert source.total_bytes == 17


def test_blocks_between_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"\n\none\n  more\n \t\n\r\ntwo\r\n\nthree")
    read = list(text_files([path], blank_lines=True).documents)
    assert [document.content for document in read] == ["one\n  more", "two", "three"]
    assert [document.place.rpartition(":")[2] for document in read] == ["3", "7", "9"]
    assert sum(document.size for document in read) == path.stat().st_size


def test_json_lines(tmp_path: Path) -> None:
    lines = [{"text": "one\n\ntwo", "id": 1}, {"text": ""}, {"text": "drei ü"}]
    path = write(tmp_path / "a", "\n".join(map(json.dumps, lines)).encode() + b"\n\n")
    assert texts(json_lines([path])) == ["one\n\ntwo", "drei ü"]


@pytest.mark.parametrize("read", [text_files, lambda paths: text_files(paths, blank_lines=True), json_lines])
def test_text_that_is_not_utf8_is_placed(tmp_path: Path, read: Callable[[list[Path]], Source]) -> None:
    path = write(tmp_path / "latin1.txt", b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin1.txt: not UTF-8 at byte 30 \(line 2, byte value 0xe9\)"):
        list(read([path]).documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl:2: not JSON: .* at column 13"),
        (b'{"body": "a", "id": 3}', r"a.jsonl:2: no text under 'text' \(the line holds: body, id\)"),
        (b'{"text": 3}', r"a.jsonl:2: no text under 'text'"),
        (b'["text"]', r"a.jsonl:2: no text under 'text' \(the line holds: list\)"),
    ],
)
def test_bad_json_lines_are_placed(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        list(json_lines([path]).documents)


def test_files_that_hold_nothing_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty.txt: the file is empty"):
        text_files([write(tmp_path / "empty.txt", b"")])
    with pytest.raises(InputError, match=r"absent: cannot read it: No such file"):
        json_lines([tmp_path / "absent"])
    with pytest.raises(InputError, match="is a folder"):
        text_files([tmp_path])


@pytest.mark.parametrize("blank_lines", [False, True])
def test_a_huge_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_lines: bool) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 2**20)
    path = write(tmp_path / "a", b"0123456789abcdef\n" * 2**16)
    with pytest.raises(InputError, match="a document over 1 MiB"):
        list(text_files([path], blank_lines=blank_lines).documents)


def nanogpt_folder(folder: Path, train: list[int], valid: list[int]) -> Path:
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(valid, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def test_nanogpt_streams_end_documents_at_50256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "NANOGPT_BLOCK", 3)  # documents then span blocks
    source = nanogpt(nanogpt_folder(tmp_path, [1, 2, 3, 4, 50256, 50256, 5, 50256], [6, 7]))
    read = [(np.asarray(document.content).tolist(), document.split) for document in source.documents]
    assert read == [([1, 2, 3, 4], "train"), ([], "train"), ([5], "train"), ([6, 7], "valid")]


def test_nanogpt_files_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path, [1, 50257], [6])
    with pytest.raises(InputError, match=r"train.bin: token 50257 is not in GPT-2's vocabulary"):
        list(nanogpt(folder).documents)
    write(folder / "train.bin", b"123")
    with pytest.raises(InputError, match=r"train.bin: an odd number of bytes"):
        list(nanogpt(folder).documents)
    (folder / "val.bin").unlink()
    with pytest.raises(InputError, match=r"val.bin: cannot read it"):
        nanogpt(folder)
    write(folder / "meta.pkl", b"")
    with pytest.raises(InputError, match=r"meta.pkl"):
        nanogpt(folder)


def test_the_default_text_is_the_known_one() -> None:
    source = wikipedia()
    read = texts(source)
    assert len(read) == len(set(read)) == 10033
    assert sum(len(text.encode()) for text in read) == source.total_bytes == 4885535
    assert "CC BY-SA 4.0" in str(source.notice)


def test_openwebtext_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {number}"}) for number in range(4000)]
    write(tmp_path / "train.jsonl", "\n".join(rows).encode())
    read = list(openwebtext(dataset=str(tmp_path)).documents)
    sides = [document.split for document in read]
    assert sides == ["train"] * 3998 + ["valid"] * 2
    order = np.random.default_rng(2357).permutation(4000)
    assert [document.content for document in read[-2:]] == [f"document {number}" for number in order[:2]]


def test_openwebtext_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if the extra were not installed
    with pytest.raises(InputError, match=r"pip install 'merit-ds\[openwebtext\]'"):
        openwebtext()
