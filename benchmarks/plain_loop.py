# SPDX-License-Identifier: Apache-2.0
"""The plain training loop: DDP, AdamW, gradient clipping, and a memory-mapped file of tokens."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from plain_gpt import PlainGPT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from merit_ds.training.config import ModelConfig
from merit_ds.training.schedule import Batch

LEARNING_RATE = 1e-3


class PlainLoop:
    """Steps of a GPT as a good plain script takes them; gradients are exchanged once a step.

    bfloat16 is autocast over float32 weights, which is how plain loops use it.

    Args:
        shape: of the model.
        rows: of the embedding, the padded vocabulary.
        batch: micro-batch and accumulation.
        tokens: a `.bin` of `merit_ds.training.data`, uint16 tokens with more than one sequence.
        dtype: float32 or bfloat16.
        rank: seeds which sequences this rank takes.
    """

    def __init__(
        self,
        shape: ModelConfig,
        *,
        rows: int,
        batch: Batch,
        tokens: Path,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
    ) -> None:
        torch.manual_seed(0)
        model = PlainGPT(shape, rows=rows).to(device)
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        # The fused step is the fastest of torch's three, on CPUs as well.
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        self._batch, self._length, self._device, self._dtype = batch, shape.seq_length, device, dtype
        self._tokens = np.memmap(tokens, dtype=np.uint16, mode="r")
        self._generator = np.random.default_rng(rank)

    def train_step(self) -> Tensor:
        """One optimizer step; returns this rank's mean loss, a scalar."""
        loss = torch.zeros((), device=self._device)
        for micro_step, (tokens, labels) in enumerate(self._micro_batches(), start=1):
            last = micro_step == self._batch.accumulation
            with nullcontext() if last else self.ddp.no_sync():
                micro_loss = self.forward(tokens, labels) / self._batch.accumulation
                self.backward(micro_loss)
            loss += micro_loss.detach()
        self.step()
        return loss

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of a micro-batch."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            loss: Tensor = self.ddp(tokens, labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch, and in the last one DDP's exchange."""
        loss.backward()

    def step(self) -> None:
        """Clip, update, and drop the gradients."""
        nn.utils.clip_grad_norm_(self.ddp.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels of a step, int64 [micro_batch, s], from random places."""
        for _ in range(self._batch.accumulation):
            starts = self._generator.integers(len(self._tokens) - self._length, size=self._batch.micro_batch)
            rows = np.stack([self._tokens[start : start + self._length + 1] for start in starts]).astype(np.int64)
            samples = torch.from_numpy(rows).to(self._device, non_blocking=True)
            yield samples[:, :-1], samples[:, 1:]
