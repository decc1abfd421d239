# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.training.data`: what it writes, what it refuses, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from merit_ds.errors import InputError
from merit_ds.training.data import main
from merit_ds.training.data_manifest import output_paths
from merit_ds.training.documents import Document
from merit_ds.training.encode import BATCHES_PER_WORKER, Encoder, encode_all
from merit_ds.training.tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(path: Path, output: Path, *options: str, tokenizer: str = "byte") -> int:
    return main(["jsonl", str(path), "--output", str(output), "--tokenizer", tokenizer, *options])


def read_side(prefix: Path, split: str) -> list[np.ndarray]:
    dataset = IndexedDataset(f"{prefix}_{split}")
    # Copies: a dataset unmaps its file when it goes, whoever still looks at it.
    return [np.array(dataset[index]) for index in range(len(dataset))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [f"Document {n}: " + "word " * (n % 17) for n in range(300)])


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_every_document_is_written_once_and_ends_with_eod(tmp_path: Path, corpus: Path, name: str) -> None:
    assert prepare(corpus, tmp_path / "out", "--valid-fraction", "0.1", tokenizer=name) == 0
    tokenizer = build_tokenizer(name)
    sides = {split: read_side(tmp_path / "out", split) for split in ("train", "valid")}
    expected = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    written = sides["train"] + sides["valid"]
    assert all(document.dtype == np.uint16 and document[-1] == tokenizer.eod for document in written)
    assert sorted(tokenizer.decode(document[:-1]) for document in written) == sorted(expected)
    assert 10 < len(sides["valid"]) < 60
    manifest = json.loads((tmp_path / "out.json").read_text())
    for split, documents in sides.items():
        assert manifest[split]["documents"] == len(documents)
        assert manifest[split]["tokens"] == sum(map(len, documents))


def test_the_split_follows_seed_and_text_only(tmp_path: Path, corpus: Path) -> None:
    """Order does not matter, copies of a text stay together, another seed chooses others."""
    lines = corpus.read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[::-1] + lines))
    valid = {}
    for name, path, seed in (("a", corpus, "1"), ("b", shuffled, "1"), ("c", corpus, "2")):
        assert prepare(path, tmp_path / name, "--valid-fraction", "0.2", "--seed", seed) == 0
        valid[name] = [BYTE.decode(document) for document in read_side(tmp_path / name, "valid")]
    assert set(valid["a"]) == set(valid["b"])
    assert len(valid["b"]) == 2 * len(valid["a"])
    assert set(valid["a"]) != set(valid["c"])


def test_output_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{n} " * 3000 for n in range(500)])  # several batches
    for workers in ("1", "2"):
        assert prepare(corpus, tmp_path / workers, "--workers", workers, "--valid-fraction", "0.1") == 0
    for one, two in zip(output_paths(f"{tmp_path / '1'}"), output_paths(f"{tmp_path / '2'}"), strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_workers_do_not_read_the_input_ahead_and_name_bad_documents() -> None:
    taken = 0

    def endless() -> Iterator[Document]:
        nonlocal taken
        while True:
            taken += 1
            yield Document("x" * 2**20 if taken < 20 else "\0", f"document {taken}", 2**20)

    encoded = encode_all(endless(), Encoder(BYTE, seed=0, valid_fraction=0.5), workers=2)
    for _ in range(5):
        next(encoded)
    assert taken <= 5 + 2 * BATCHES_PER_WORKER
    with pytest.raises(InputError, match="document 20: NUL"):
        list(encoded)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Peaks of 8 MB and 32 MB of text; holding a split's text or tokens would add at least 24 MB."""
    peaks = []
    for megabytes in (8, 32):
        corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{n} " + "x" * 20_000 for n in range(50 * megabytes)])
        tracemalloc.start()
        assert prepare(corpus, tmp_path / f"{megabytes}", "--valid-fraction", "0.1") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * 2**20, peaks


def test_nanogpt_tokens_arrive_unchanged(tmp_path: Path) -> None:
    stream = np.array([10, 11, 50256, 12, 50256], dtype=np.uint16)
    stream.tofile(tmp_path / "train.bin")
    stream[3:].tofile(tmp_path / "val.bin")
    assert main(["nanogpt", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out_train.bin").read_bytes() == (tmp_path / "train.bin").read_bytes()
    assert (tmp_path / "out_valid.bin").read_bytes() == (tmp_path / "val.bin").read_bytes()
    assert [len(document) for document in read_side(tmp_path / "out", "train")] == [3, 2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["only one"], "no document of 1 fell on the "),
        ([" "], "the source holds no documents"),
        (["fine", "a\0b"], "corpus.jsonl:2: NUL at byte 1 (line 1) of the document"),
        (["fine", "\ud800"], "corpus.jsonl:2: half a surrogate pair at character 0"),
    ],
)
def test_bad_input_ends_in_one_line_and_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], message: str
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    assert prepare(corpus, tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == [corpus]


def test_existing_output_is_kept_unless_told_otherwise(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out"
    assert prepare(corpus, output, "--valid-fraction", "0.1") == 0
    before = [path.read_bytes() for path in output_paths(str(output))]
    assert prepare(corpus, output, "--valid-fraction", "0.3") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [path.read_bytes() for path in output_paths(str(output))] == before
    write_jsonl(corpus, ["a\0"])
    assert prepare(corpus, output, "--overwrite") == 1
    assert [path.read_bytes() for path in output_paths(str(output))] == before
    write_jsonl(corpus, [f"other {n}" for n in range(99)])
    assert prepare(corpus, output, "--overwrite", "--valid-fraction", "0.3") == 0
    assert [path.read_bytes() for path in output_paths(str(output))] != before


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_kill_leaves_no_files_and_no_processes(tmp_path: Path) -> None:
    """SIGKILL while tokens are being written: no final name exists, the workers end, a second run succeeds."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{n} " + "x" * 100_000 for n in range(500)])
    output = tmp_path / "out"
    command = [sys.executable, "-m", "merit_ds.training.data", "jsonl", str(corpus), "--output", str(output)]
    command += ["--tokenizer", "byte", "--workers", "2", "--valid-fraction", "0.1"]
    partial = tmp_path / "out.partial" / "out_train.bin"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0, 60)
        workers = children(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not any(path.exists() for path in output_paths(str(output)))
    assert len(workers) >= 2
    wait_until(lambda: not any(map(alive, workers)), 20)
    assert prepare(corpus, output, "--valid-fraction", "0.1") == 0
    assert not partial.parent.exists()
    assert len(read_side(output, "train")) + len(read_side(output, "valid")) == 500


def test_two_writers_of_one_output_are_told_apart(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True)"
    (tmp_path / "out.partial").mkdir()
    command = [sys.executable, "-c", f"{lock}; sys.stdin.read()", str(tmp_path / "out.partial")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert prepare(corpus, tmp_path / "out") == 1
    assert "another process is preparing this output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--valid-fraction", "1"], "1 is not between 0 and 1"),
        (["--workers", "0"], "0 is not a whole number above 0"),
        (["--seed", "-1"], "-1 is not a whole number from 0"),
    ],
)
def test_bad_options_are_explained(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        prepare(corpus, tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err
