# SPDX-License-Identifier: Apache-2.0
"""The tokenizers, with GPT-2's real vocabulary, and where that vocabulary comes from."""

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_ds.errors import InputError
from merit_ds.training.fetch import FetchError, cache_folder, run, wheel_member
from merit_ds.training.tokenizer import VOCAB_WHEEL, build_tokenizer

GPT2 = build_tokenizer("gpt2")
BYTE = build_tokenizer("byte")


def cut_off_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """An empty cache, and a proxy at which nobody answers, for pip and tiktoken alike."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken"))
    for name in ("HTTPS_PROXY", "https_proxy", "PIP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def test_gpt2_ids_are_the_published_ones() -> None:
    assert (GPT2.vocab_size, GPT2.eod) == (50257, 50256)
    assert GPT2.encode("Hello world").tolist() == [15496, 995]
    assert GPT2.encode("I've  2 cats").tolist() == [40, 1053, 220, 362, 11875]
    assert GPT2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


def test_the_end_of_text_mark_inside_a_text_is_ordinary() -> None:
    ids = GPT2.encode("<|endoftext|>").tolist()
    assert GPT2.eod not in ids
    assert GPT2.decode(ids) == "<|endoftext|>"


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_gpt2_gives_back_any_text(text: str) -> None:
    assert GPT2.decode(GPT2.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_bytes_give_back_any_text_without_nul(text: str) -> None:
    ids = BYTE.encode(text)
    assert BYTE.decode(ids) == text
    assert BYTE.eod not in ids


def test_nul_is_refused_with_its_place() -> None:
    with pytest.raises(InputError, match=r"NUL at byte 6 \(line 2\)"):
        BYTE.encode("one\ntw\0o")


@pytest.mark.parametrize("tokenizer", [GPT2, BYTE], ids=["gpt2", "byte"])
def test_there_is_no_pad_token(tokenizer: object) -> None:
    """With a `pad`, GPTDataset takes the loss off every label that equals it."""
    assert not hasattr(tokenizer, "pad")


def test_where_the_vocabulary_comes_from_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that is given, or one in the cache whose hash is right; else the error names the way out."""
    (tmp_path / "gpt2.tiktoken").write_bytes(wheel_member(*VOCAB_WHEEL))
    cut_off_network(monkeypatch, tmp_path)
    assert build_tokenizer("gpt2", vocab=tmp_path / "gpt2.tiktoken").encode("Hello world").tolist() == [15496, 995]

    cache_folder().mkdir(parents=True)
    (tmp_path / "gpt2.tiktoken").rename(cache_folder() / "gpt2.tiktoken")
    assert build_tokenizer("gpt2").encode("Hello world").tolist() == [15496, 995]

    (cache_folder() / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    tokenizer = build_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)  # what training on prepared data needs
    with pytest.raises(InputError, match=r"give a copy of r50k_base.tiktoken with --vocab FILE"):
        tokenizer.encode("")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"IQ== 0\n")
    with pytest.raises(InputError, match=r"other: not GPT-2's vocabulary"):
        build_tokenizer("gpt2", vocab=tmp_path / "other")
    with pytest.raises(InputError, match=r"absent: cannot read the vocabulary"):
        build_tokenizer("gpt2", vocab=tmp_path / "absent")
    with pytest.raises(InputError, match="choose gpt2 or byte"):
        build_tokenizer("bpe")


def test_a_download_that_hangs_is_cut_short() -> None:
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"no answer within 0.5 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5)
    assert time.monotonic() - start < 10
