# SPDX-License-Identifier: Apache-2.0
"""Prepared data as Megatron-core's GPTDataset gives it: contents, order, and damaged files."""

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from merit_ds.errors import InputError
from merit_ds.training.config import DataConfig
from merit_ds.training.data import main
from merit_ds.training.dataset import Sequences, micro_batches, open_datasets
from merit_ds.training.tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")
SEQ_LENGTH = 16
VALID_SAMPLES = 10


def prepare(prefix: Path, word: str, *options: str) -> Path:
    """500 documents of different lengths, each naming `word`."""
    text = prefix.parent / "text"
    text.write_text("\n\n".join(f"{word} {n} " + "etc " * (n % 9) for n in range(500)))
    arguments = ["text", str(text), "--blank-lines", "--output", str(prefix), "--tokenizer", "byte"]
    assert main([*arguments, "--valid-fraction", "0.1", *options]) == 0
    return prefix


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data") / "corpus", "alpha")


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / prepared.name


def open_at(prefix: Path, **changes: Any) -> tuple[Sequences, Sequences]:
    settings = {"seq_length": SEQ_LENGTH, "seed": 1, "train_samples": 2000, "valid_samples": VALID_SAMPLES}
    data = DataConfig(prefix=str(prefix), tokenizer="byte")
    return open_datasets(data, **{"tokenizer": BYTE, **settings, **changes})


def test_sequences_are_the_text_cut_at_every_length(tmp_path: Path) -> None:
    """One document a side: each sequence is a run of seq_length tokens of it, its labels are the next tokens."""
    document = "".join(f"{n:04d}" for n in range(500))
    (tmp_path / "text").write_text("\n\n".join(f"{document} {n}" for n in range(2)))
    seed = next(seed for seed in range(99) if _prepare_pair(tmp_path, seed) == 0)
    train, valid = open_at(tmp_path / f"pair{seed}", train_samples=100)
    for dataset in (train, valid):
        samples = [dataset[index] for index in range(len(dataset))]
        runs = sorted(BYTE.decode(sample["tokens"].tolist()) for sample in samples)
        assert runs == [document[start : start + SEQ_LENGTH] for start in range(0, 2000, SEQ_LENGTH)]
        for sample in samples:
            start = document.index(BYTE.decode(sample["tokens"].tolist()))
            following = BYTE.decode(sample["labels"].tolist())
            assert (document + " ")[start + 1 : start + 1 + SEQ_LENGTH] == following
            assert sample["loss_mask"].tolist() == [1.0] * SEQ_LENGTH
            assert sample["position_ids"].tolist() == list(range(SEQ_LENGTH))


def _prepare_pair(folder: Path, seed: int) -> int:
    arguments = ["text", str(folder / "text"), "--blank-lines", "--output", str(folder / f"pair{seed}")]
    return main([*arguments, "--tokenizer", "byte", "--valid-fraction", "0.5", "--seed", str(seed)])


def test_the_end_of_a_document_counts_in_the_loss(prepared: Path) -> None:
    """Its token is 0 here, which a tokenizer with `pad` = 0 would mask."""
    train, _ = open_at(prepared)
    samples = [train[index] for index in range(500)]
    assert any((sample["labels"] == BYTE.eod).any() for sample in samples)
    assert all((sample["loss_mask"] == 1).all() for sample in samples)


def test_data_prepared_again_is_read_anew_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    """Megatron-core's index cache knows the path but not the contents: stale, it gave wrong samples or a crash."""
    prefix = prepare(tmp_path / "corpus", "alpha")
    files = sorted(tmp_path.rglob("*"))
    first = [train["tokens"] for train in map(open_at(prefix)[0].__getitem__, range(200))]
    assert sorted(tmp_path.rglob("*")) == files
    prepare(tmp_path / "corpus", "a longer word than before", "--overwrite")
    second = [train["tokens"] for train in map(open_at(prefix)[0].__getitem__, range(2000))]
    assert "alpha" in "".join(BYTE.decode(tokens.tolist()) for tokens in first)
    text = "".join(BYTE.decode(tokens.tolist()) for tokens in second)
    assert "alpha" not in text and "longer word" in text


def rows(dataset: Sequences, *, start: int, stop: int, micro_batch: int, world: int) -> list[list[torch.Tensor]]:
    """Token rows in the order of micro-steps, ranks within a micro-step, rows within a rank."""
    ranks = [
        list(micro_batches(dataset, start=start, stop=stop, micro_batch=micro_batch, rank=rank, world=world))
        for rank in range(world)
    ]
    steps = max(map(len, ranks))
    return [[row for rank in ranks for batch in rank[k : k + 1] for row in batch["tokens"]] for k in range(steps)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_come_in_order_whatever_the_number_of_ranks(prepared: Path, world: int) -> None:
    train, _ = open_at(prepared)
    steps = rows(train, start=24, stop=72, micro_batch=2, world=world)
    assert [len(step) for step in steps] == [2 * world] * (24 // world)
    expected = torch.stack([train[index]["tokens"] for index in range(24, 72)])
    assert torch.equal(torch.stack(list(chain(*steps))), expected)


def test_a_continued_run_gets_what_it_would_have_got(prepared: Path) -> None:
    whole = list(micro_batches(open_at(prepared)[0], start=0, stop=64, micro_batch=4, rank=1, world=2))
    rest = list(micro_batches(open_at(prepared)[0], start=40, stop=64, micro_batch=4, rank=1, world=2))
    assert len(whole) == 8 and len(rest) == 3
    for expected, batch in zip(whole[5:], rest, strict=True):
        assert expected.keys() == batch.keys() == {"tokens", "labels", "loss_mask", "position_ids"}
        assert all(torch.equal(expected[key], batch[key]) for key in batch)
    assert whole[0]["tokens"].shape == (4, SEQ_LENGTH)
    assert whole[0]["tokens"].dtype == whole[0]["labels"].dtype == whole[0]["position_ids"].dtype == torch.int64
    assert whole[0]["loss_mask"].dtype == torch.float32


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_counts_each_of_its_samples_once(prepared: Path, world: int) -> None:
    """10 samples are no multiple of 3 rows a rank: the last micro-step is smaller."""
    _, valid = open_at(prepared)
    assert len(valid) > VALID_SAMPLES
    steps = rows(valid, start=0, stop=VALID_SAMPLES, micro_batch=3, world=world)
    expected = torch.stack([valid[index]["tokens"] for index in range(VALID_SAMPLES)])
    assert torch.equal(torch.stack(list(chain(*steps))), expected)


def test_order_depends_on_the_seed(prepared: Path) -> None:
    first, again, other = (open_at(prepared, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(first[index]["tokens"], again[index]["tokens"]) for index in range(50))
    assert not all(torch.equal(first[index]["tokens"], other[index]["tokens"]) for index in range(50))


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def test_damaged_files_are_named(copy: Path) -> None:
    folder = copy.parent
    for suffix in ("_train.idx", "_valid.idx", "_train.bin", "_valid.bin"):
        path = folder / f"corpus{suffix}"
        intact = path.read_bytes()
        flip_byte(path, len(intact) // 2)
        with pytest.raises(InputError, match=f"corpus{suffix}: corrupt"):
            open_at(copy)
        path.write_bytes(intact[:-2])
        with pytest.raises(InputError, match=rf"corpus{suffix}: .* bytes instead of .* truncated"):
            open_at(copy)
        path.unlink()
        with pytest.raises(InputError, match=f"corpus{suffix}: missing"):
            open_at(copy)
        path.write_bytes(intact)
    open_at(copy)


def test_large_token_files_are_hashed_by_verify_only(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("merit_ds.training.dataset.HASH_AT_START_BYTES", 100)
    assert main(["verify", str(copy)]) == 0
    flip_byte(Path(f"{copy}_train.bin"), 50)
    open_at(copy)
    assert main(["verify", str(copy)]) == 1
    assert "corpus_train.bin: corrupt" in capsys.readouterr().err
    flip_byte(Path(f"{copy}_train.idx"), 50)
    with pytest.raises(InputError, match=r"corpus_train.idx: corrupt"):
        open_at(copy)


def test_missing_or_damaged_manifest(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.json: no prepared data .* python -m merit_ds.training.data"):
        open_at(tmp_path / "absent")
    manifest = Path(f"{copy}.json")
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(InputError, match=r"corpus.json: damaged"):
        open_at(copy)


def test_data_that_does_not_fit_the_run(prepared: Path) -> None:
    """Each of these would loop for ever, repeat validation text, or train on nonsense."""
    with pytest.raises(InputError, match=r"prepared with tokenizer byte, but the recipe's data\.tokenizer is gpt2"):
        open_at(prepared, tokenizer=build_tokenizer("gpt2"))
    with pytest.raises(InputError, match=r"corpus_train.bin: .* tokens make 0 sequences of 1000000"):
        open_at(prepared, seq_length=1_000_000)
    with pytest.raises(InputError, match=r"corpus_valid.bin: .* but 5000 are needed; lower run.eval_sequences"):
        open_at(prepared, valid_samples=5000)


def _first_samples(rank: int, prefix: Path) -> list[list[int]]:
    train, valid = open_at(prefix)
    return [dataset[index]["tokens"].tolist() for dataset in (train, valid) for index in range(5)]


@pytest.mark.full
def test_every_rank_of_a_group_sees_the_same_samples(prepared: Path) -> None:
    alone = _first_samples(0, prepared)
    assert run_ranks(2, _first_samples, prepared) == [alone, alone]
