# SPDX-License-Identifier: Apache-2.0
"""What a GPU's memory holds at the fullest moment of a step, by part, under DeepSpeed 0.19's wrappers.

Parameters, gradients and optimizer state are tensors that DeepSpeed allocates, counted to the byte but for its
transients; activations are those of `merit_ds.plan.paper`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from merit_ds.payload import zero_bounds
from merit_ds.plan.buckets import engine_buckets, zero_buckets
from merit_ds.plan.paper import Span
from merit_ds.plan.sizes import Sizes, Spread
from merit_ds.plan.wrapper import Wrapper

_MASTER = 4  # bytes: weights that the optimizer changes, its moments, and what it is given are float32


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank at its fullest moment.

    Attributes:
        parameters: the model's, ZeRO's padding and frozen ones included.
        gradients: in whatever buffers they lie.
        optimizer: float32 master weights, where the model's are not what is stepped, and moments.
        activations: what the backward pass needs of the forward pass, and the loss's tensors.
        buffers: DeepSpeed's buckets and copies around a reduction, and the optimizer's maxima.
        moment: "backward", "reduction" or "step".
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    moment: str

    @property
    def total(self) -> int:
        """All parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


class _Instant(NamedTuple):
    name: str
    gradients: int
    buffers: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.buffers + self.activations


def memory_of(
    wrapper: Wrapper,
    sizes: Sizes,
    spans: Sequence[Span],
    spread: Spread,
    *,
    moments: Sequence[int],
    scratch: int,
) -> Memory:
    """The fullest moment of the fullest rank.

    Args:
        spans: of a micro-batch.
        spread: of the batch.
        moments: of each group, float32 numbers that the optimizer keeps for each weight.
        scratch: bytes that the optimizer keeps beside its state.
    """
    ranks = spread.ranks
    weights = sizes.padded(ranks) if wrapper.shards else sizes.trained
    stepped = sizes.partitions(ranks) if wrapper.shards else [sum(group) for group in sizes.groups]
    masters = 0 if wrapper.kind == "none" else 1
    fullest = max(
        _INSTANTS[wrapper.kind](wrapper, sizes, spans, ranks, spread.accumulation), key=lambda each: each.total
    )
    return Memory(
        parameters=wrapper.dtype.itemsize * (weights + sizes.frozen),
        gradients=fullest.gradients,
        optimizer=_MASTER * sum(size * (masters + kept) for size, kept in zip(stepped, moments, strict=True)),
        activations=fullest.activations,
        buffers=fullest.buffers + scratch,
        moment=fullest.name,
    )


def _unsharded(
    wrapper: Wrapper, sizes: Sizes, spans: Sequence[Span], ranks: int, accumulation: int
) -> Iterator[_Instant]:
    """Stage 0: `grad` of every parameter; a bucket's copy to reduce; float32 copies for the step in 16 bits."""
    gradients = wrapper.dtype.itemsize * sizes.trained
    bucket = max(engine_buckets(sizes.in_order, wrapper.bucket))
    yield from _backward(spans, accumulation, itemsize=wrapper.dtype.itemsize)
    yield _Instant("reduction", gradients, bucket * (wrapper.dtype.itemsize + _cast(wrapper, wrapper.dtype)))
    yield _Instant("step", gradients + (_MASTER * sizes.trained if wrapper.kind == "float32 copies" else 0), 0)


def _bf16_optimizer(
    wrapper: Wrapper, sizes: Sizes, spans: Sequence[Span], ranks: int, accumulation: int
) -> Iterator[_Instant]:
    """Float32 sums of all gradients on every rank, beside the `grad` of each micro-batch; they are sent in 16 bits."""
    sums = _MASTER * sizes.padded(ranks)
    flats = [zero_bounds(sum(group), ranks)[-1] for group in sizes.groups]
    bucket = max(engine_buckets(flats, wrapper.bucket))
    copied = _MASTER * bucket if bucket > max(flats) else 0  # several buffers in one bucket are put together first
    yield from _backward(spans, accumulation, itemsize=wrapper.dtype.itemsize, beside=sums)
    held = sums + wrapper.dtype.itemsize * sizes.trained
    yield _Instant("reduction", held, copied + bucket * _cast(wrapper, torch.float32))


def _zero1(wrapper: Wrapper, sizes: Sizes, spans: Sequence[Span], ranks: int, accumulation: int) -> Iterator[_Instant]:
    """Micro-batches are summed in every `grad`, or in float32 beside it, and go through buckets after the last."""
    summed = wrapper.accumulation.itemsize
    buckets = summed * wrapper.bucket * wrapper.buffers
    yield from _backward(spans, accumulation, itemsize=summed, buffers=buckets)
    fill = max(zero_buckets(sizes.in_order, wrapper.bucket))
    kept = sizes.partition(ranks) if wrapper.has_compact_sums else max(0, sizes.touched(ranks) - fill)
    yield _Instant("reduction", summed * (sizes.trained + kept), buckets + fill * _cast(wrapper, wrapper.accumulation))
    yield _step(wrapper, sizes, ranks)


def _zero2(wrapper: Wrapper, sizes: Sizes, spans: Sequence[Span], ranks: int, accumulation: int) -> Iterator[_Instant]:
    """Gradients go into a bucket as they come; when it is full it is reduced, and each rank keeps what it owns."""
    own, compact, partition = wrapper.dtype.itemsize, wrapper.has_compact_sums, sizes.partition(ranks)
    owned = _MASTER * partition if compact else own * sizes.touched(ranks)
    before = owned if accumulation > 1 or compact else 0
    after = owned if compact else before + owned  # a micro-batch's own, beside the sum of those before
    copied = (own if wrapper.copies_bucket else 0) + _cast(wrapper, wrapper.dtype)
    kept, filled, widest, buckets = before, 0, 0, 0
    for span in spans:
        yield _Instant("backward", kept, buckets, span.peak)
        buckets = own * wrapper.bucket * wrapper.buffers
        if filled and filled + span.elements > wrapper.bucket:
            added = _MASTER * min(widest, partition) if compact else 0
            yield _Instant("backward", kept + own * span.elements, buckets + copied * filled + added, span.end)
            kept, filled, widest = after, 0, 0
        filled, widest = filled + span.elements, max(widest, span.elements)
    # A gradient that is larger than the bucket stays where it is.
    yield _Instant("reduction", kept + (own * filled if filled > wrapper.bucket else 0), buckets + copied * filled)
    yield _Instant("reduction", after, buckets)
    yield _step(wrapper, sizes, ranks)


def _step(wrapper: Wrapper, sizes: Sizes, ranks: int) -> _Instant:
    """What ZeRO hands to the optimizer: a float32 slice, made from what the reduction left."""
    own, partition = wrapper.dtype.itemsize, sizes.partition(ranks)
    if wrapper.has_compact_sums:
        return _Instant("step", _MASTER * partition, 0)
    flat = _MASTER * partition + (own * partition if own != _MASTER else 0)
    return _Instant("step", own * sizes.touched(ranks) + flat, 0)


def _zero_optimizer(
    wrapper: Wrapper, sizes: Sizes, spans: Sequence[Span], ranks: int, accumulation: int
) -> Iterator[_Instant]:
    return (_zero1 if wrapper.stage == 1 else _zero2)(wrapper, sizes, spans, ranks, accumulation)


_INSTANTS = {
    "none": _unsharded,
    "float32 copies": _unsharded,
    "BF16_Optimizer": _bf16_optimizer,
    "DeepSpeedZeroOptimizer": _zero_optimizer,
}


def _backward(
    spans: Sequence[Span], accumulation: int, *, itemsize: int, beside: int = 0, buffers: int = 0
) -> Iterator[_Instant]:
    """The last micro-batch where every gradient is kept: those of earlier ones are there, else they come one by one."""
    coming = 0
    everything = itemsize * sum(span.elements for span in spans)
    for span in spans:
        there = everything if accumulation > 1 else coming
        yield _Instant("backward", beside + there, buffers if there else 0, span.peak)
        coming += itemsize * span.elements


def _cast(wrapper: Wrapper, held: torch.dtype) -> int:
    """Bytes an element of the copy that is sent, where the wire's dtype is not that of what is held."""
    return 0 if wrapper.communication == held else wrapper.communication.itemsize
