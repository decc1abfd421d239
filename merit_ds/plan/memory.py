# SPDX-License-Identifier: Apache-2.0
"""What a GPU's memory holds at the fullest moment of a step, by part, under DeepSpeed 0.19's wrappers.

Parameters, gradients and optimizer state are tensors that DeepSpeed allocates, counted to the byte but for its
transients; activations are those of `merit_ds.plan.paper`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from merit_ds.payload import zero_bounds
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


@dataclass(frozen=True)
class Sizes:
    """The parameters by their elements.

    Attributes:
        groups: of each optimizer group's parameters that are trained, in order.
        frozen: of all others together.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: int = 0

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        return max(map(max, self.groups))

    def padded(self, ranks: int) -> int:
        """Elements of ZeRO's flat buffers."""
        return sum(zero_bounds(sum(sizes), ranks)[-1] for sizes in self.groups)

    def partition(self, ranks: int) -> int:
        """Elements of a rank's slices."""
        return self.padded(ranks) // ranks

    def touched(self, ranks: int) -> int:
        """Elements of all parameters of which a rank's slices hold a part, on the rank with the most.

        ZeRO-2 keeps a parameter's gradient whole where a rank owns any of it.
        """
        by_rank = [0] * ranks
        for sizes in self.groups:
            partition = zero_bounds(sum(sizes), ranks)[1]
            for size, stop in zip(sizes, accumulate(sizes), strict=True):
                for rank in range((stop - size) // partition, (stop - 1) // partition + 1):
                    by_rank[rank] += size
        return max(by_rank)


class _Moment(NamedTuple):
    name: str
    gradients: int
    buffers: int
    activations: int


def memory_of(
    wrapper: Wrapper, sizes: Sizes, *, ranks: int, accumulation: int, moments: int, activations: int, scratch: int
) -> Memory:
    """The fullest moment of the fullest rank.

    Args:
        ranks: data-parallel ones, which hold slices.
        accumulation: micro-batches of a step.
        moments: float32 numbers that the optimizer keeps for each weight.
        activations: bytes.
        scratch: bytes that the optimizer keeps beside its state.
    """
    weights = sizes.padded(ranks) if wrapper.shards else sizes.trained
    stepped = sizes.partition(ranks) if wrapper.shards else sizes.trained
    masters = 0 if wrapper.kind == "none" else 1
    fullest = max(
        _MOMENTS[wrapper.kind](wrapper, sizes, ranks, accumulation, activations),
        key=lambda moment: moment.gradients + moment.buffers + moment.activations,
    )
    return Memory(
        parameters=wrapper.dtype.itemsize * (weights + sizes.frozen),
        gradients=fullest.gradients,
        optimizer=_MASTER * stepped * (masters + moments),
        activations=fullest.activations,
        buffers=fullest.buffers + scratch,
        moment=fullest.name,
    )


def _unsharded(wrapper: Wrapper, sizes: Sizes, ranks: int, accumulation: int, activations: int) -> list[_Moment]:
    """Stage 0: `grad` of every parameter; a bucket's copy to reduce; float32 copies for the step in 16 bits."""
    gradients = wrapper.dtype.itemsize * sizes.trained
    bucket = _bucket(wrapper, [size for group in sizes.groups for size in group])
    copies = _MASTER * sizes.trained if wrapper.kind == "float32 copies" else 0
    return [
        _Moment("backward", gradients, 0, activations),
        _Moment("reduction", gradients, bucket * (wrapper.dtype.itemsize + _cast(wrapper, wrapper.dtype)), 0),
        _Moment("step", gradients + copies, 0, 0),
    ]


def _bf16_optimizer(wrapper: Wrapper, sizes: Sizes, ranks: int, accumulation: int, activations: int) -> list[_Moment]:
    """Float32 sums of all gradients on every rank, beside the `grad` of each micro-batch; they are sent in 16 bits."""
    gradients = _MASTER * sizes.padded(ranks) + wrapper.dtype.itemsize * sizes.trained
    flats = [zero_bounds(sum(group), ranks)[-1] for group in sizes.groups]
    bucket = _bucket(wrapper, flats)
    copied = _MASTER * bucket if bucket > max(flats) else 0  # several buffers in one bucket are put together first
    return [
        _Moment("backward", gradients, 0, activations),
        _Moment("reduction", gradients, copied + bucket * _cast(wrapper, torch.float32), 0),
        _Moment("step", gradients, 0, 0),
    ]


def _zero_optimizer(wrapper: Wrapper, sizes: Sizes, ranks: int, accumulation: int, activations: int) -> list[_Moment]:
    """ZeRO-1 sums micro-batches in every `grad`, ZeRO-2 in what a rank owns; both reduce by way of buckets."""
    own, summed = wrapper.dtype.itemsize, wrapper.accumulation.itemsize
    partition, touched = sizes.partition(ranks), sizes.touched(ranks)
    fill = max(min(wrapper.bucket, sizes.trained), sizes.largest if sizes.largest > wrapper.bucket else 0)
    if wrapper.stage == 1:
        buckets = summed * wrapper.bucket * wrapper.buffers
        gradients = summed * sizes.trained
        kept = summed * (partition if wrapper.has_compact_sums else max(0, touched - fill))
        transient = own * sizes.largest if wrapper.has_compact_sums else 0
        moments = [
            _Moment("backward", gradients + transient, buckets, activations),
            _Moment("reduction", gradients + kept, buckets + fill * _cast(wrapper, wrapper.accumulation), 0),
        ]
    else:
        buckets = own * (wrapper.bucket * wrapper.buffers + fill) + fill * _cast(wrapper, wrapper.dtype)
        each = own * touched  # of a micro-batch, beside the sum of those before
        kept = summed * partition if wrapper.has_compact_sums else each * min(accumulation, 2)
        moments = [_Moment("backward", kept + own * sizes.largest, buckets, activations)]
    if wrapper.has_compact_sums:
        return [*moments, _Moment("step", summed * partition, 0, 0)]
    flat = _MASTER * partition + (own * partition if own != _MASTER else 0)
    return [*moments, _Moment("step", own * touched + flat, 0, 0)]


_MOMENTS = {
    "none": _unsharded,
    "float32 copies": _unsharded,
    "BF16_Optimizer": _bf16_optimizer,
    "DeepSpeedZeroOptimizer": _zero_optimizer,
}


def _bucket(wrapper: Wrapper, sizes: Sequence[int]) -> int:
    """Elements of the largest bucket: tensors one after another until they are more than its size."""
    largest = filled = 0
    for size in sizes:
        filled += size
        largest = max(largest, filled)
        if filled > wrapper.bucket:
            filled = 0
    return largest


def _cast(wrapper: Wrapper, held: torch.dtype) -> int:
    """Bytes an element of the copy that is sent, where the wire's dtype is not that of what is held."""
    return 0 if wrapper.communication == held else wrapper.communication.itemsize
