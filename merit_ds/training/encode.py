# SPDX-License-Identifier: Apache-2.0
"""Documents to tokens, in several processes: the same tokens in the same order whatever their number."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merit_ds.errors import InputError
from merit_ds.training.documents import Document, Split
from merit_ds.training.tokenizer import Tokenizer

BATCH_BYTES = 2**20
BATCHES_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document's tokens with the end-of-document token, uint16 [tokens], and its side of the split."""

    tokens: NDArray[np.uint16]
    split: Split
    size: int


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens and puts each whole document on one side of the split.

    The side follows from a hash of seed and text: it depends on neither the order nor the number of documents, and
    copies of a text fall on the same side, so none of them leaks from training into validation.
    """

    tokenizer: Tokenizer
    seed: int
    valid_fraction: float

    def __call__(self, batch: list[Document]) -> list[Encoded]:
        """Encode a batch.

        Raises:
            InputError: names the document that cannot be encoded.
        """
        return [self._encode(document) for document in batch]

    def _encode(self, document: Document) -> Encoded:
        content, split = document.content, document.split
        if isinstance(content, str):
            try:
                split = split or self._side(content)
                content = self.tokenizer.encode(content)
            except UnicodeEncodeError as error:
                raise InputError(f"{document.place}: half a surrogate pair at character {error.start}") from None
            except InputError as error:
                raise InputError(f"{document.place}: {error}") from None
        tokens = np.append(content, np.uint16(self.tokenizer.eod))
        return Encoded(tokens, split or "train", document.size)

    def _side(self, text: str) -> Split:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=self.seed.to_bytes(8)).digest()
        return "valid" if int.from_bytes(digest) < self.valid_fraction * 2**64 else "train"


def encode_all(documents: Iterable[Document], encoder: Encoder, *, workers: int) -> Iterator[Encoded]:
    """Encode a stream of documents, in order.

    Args:
        documents: read only as far ahead as BATCHES_PER_WORKER batches for each worker.
        encoder: what is done to each.
        workers: processes; with 1, this process does the work.
    """
    if workers == 1:
        for batch in _batches(documents):
            yield from encoder(batch)
        return
    # Not forked: this process may hold threads (progress bar, torch), whose locks a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in _batches(documents):
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= BATCHES_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """About BATCH_BYTES of documents at a time, so that a queue of batches is bounded in bytes."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder: Encoder  # of a worker process; sent once, as GPT-2's vocabulary is large beside a batch


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when the main process was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Document]) -> list[Encoded]:
    return _encoder(batch)
