# SPDX-License-Identifier: Apache-2.0
"""The model on paper: the trainer's own, built and run on the "meta" device, where tensors have sizes and no memory.

Tensor-parallel ranks are played by torch's fake process group, whose collectives do nothing, so that one process sees
what a rank holds, keeps for the backward pass and sends. Attention is counted as a flash kernel (arXiv 2205.14135) has
it, which keeps queries, keys, values, its result and one number for each row of scores.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from merit_ds.plan.ledger import Ledger
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model, initialise_megatron, masked_mean
from merit_ds.training.parallel import allow_sequence_parallel_on_cpu

META = torch.device("meta")


class Span(NamedTuple):
    """The part of a micro-batch up to one parameter's gradient; the first holds the forward pass and the loss.

    Attributes:
        elements: of the gradient that ends it.
        peak: bytes alive beside parameters and earlier gradients, at most.
        end: those alive at its end, the gradient itself not among them.
    """

    elements: int
    peak: int
    end: int


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of a rank needs beside parameters and gradients, and what it sends.

    Attributes:
        spans: in the order in which gradients come.
        tensor_bytes: handed to collectives of the tensor-parallel ranks, by collective.
        tensor_calls: their number, by collective.
    """

    spans: tuple[Span, ...]
    tensor_bytes: dict[str, int]
    tensor_calls: dict[str, int]


@contextmanager
def paper_model(model: ModelConfig, *, vocab_size: int, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """One rank's model on the meta device; no process group may exist, and none is left.

    Args:
        vocab_size: tokens of the tokenizer, before padding.
        dtype: of the parameters.

    Raises:
        InputError: the vocabulary does not split over the tensor-parallel ranks.
    """
    current_device, attention = torch.cuda.current_device, functional.scaled_dot_product_attention
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=model.tensor_parallel)
    try:
        initialise_megatron(seed=0, device=META, tensor_parallel=model.tensor_parallel)
        if model.sequence_parallel:
            allow_sequence_parallel_on_cpu()
        # Megatron-core takes the device of rotary positions and of sequence parallelism's buffers from here.
        torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
        functional.scaled_dot_product_attention = _flash_attention  # type: ignore[assignment]
        yield build_model(model, vocab_size=vocab_size, dtype=dtype, device=META, seed=0)
    finally:
        torch.cuda.current_device = current_device
        functional.scaled_dot_product_attention = attention
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def run_micro_batch(model: torch.nn.Module, *, sequences: int, seq_length: int) -> MicroBatch:
    """Run a forward and a backward pass, and count.

    Args:
        model: of `paper_model`; its gradients are dropped as they come.
    """
    spans: list[Span] = []

    def end_span(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        spans.append(Span(parameter.numel(), ledger.peak, ledger.alive - parameter.grad.nbytes))
        parameter.grad = None
        ledger.reset_peak()

    handles = [
        parameter.register_post_accumulate_grad_hook(end_span)  # type: ignore[no-untyped-call]
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    ledger = Ledger(known=[parameter.untyped_storage() for parameter in model.parameters()])
    shape = (sequences, seq_length)
    with ledger:
        tokens, positions = (torch.zeros(shape, dtype=torch.int64, device=META) for _ in range(2))
        mask = torch.ones(shape, device=META)
        loss = masked_mean(model(tokens, positions, None, labels=tokens), mask)
        loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    sent_bytes: Counter[str] = Counter()
    sent_calls: Counter[str] = Counter()
    for sent in ledger.sent:
        if len(sent.ranks) > 1:
            sent_bytes[sent.collective] += sent.size
            sent_calls[sent.collective] += 1
    return MicroBatch(tuple(spans), dict(sent_bytes), dict(sent_calls))


def _flash_attention(
    query: Any, key: Any, value: Any, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    """As a GPU's flash kernel: on the meta device torch's own choice is to write out the scores."""
    assert not enable_gqa, "the trainer's models have as many keys as queries"
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
