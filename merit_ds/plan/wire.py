# SPDX-License-Identifier: Apache-2.0
"""What a rank hands to collectives in one training step: DeepSpeed's, the optimizer's and the trainer's.

Held against the collectives of the trainer's real steps by `tests/test_plan_run.py`. Evaluation, checkpoints and what
telemetry samples come on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from merit_ds.payload import zero_bounds
from merit_ds.plan.buckets import engine_buckets, zero_buckets
from merit_ds.plan.exchange import Exchange
from merit_ds.plan.optimizers import Optimizer
from merit_ds.plan.paper import MicroBatch
from merit_ds.plan.sizes import Sizes, Spread
from merit_ds.plan.wrapper import Wrapper

Scope = Literal["data", "tensor", "all"]

_RING: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce-scatter": lambda ranks: (ranks - 1) / ranks,
    "all-gather": lambda ranks: ranks - 1,
    "reduce": lambda ranks: 1,
    "broadcast": lambda ranks: 1,
    "all-to-all": lambda ranks: (ranks - 1) / ranks,
}
"""Bytes that a rank sends on a ring, for each that it hands in; an all-gather is handed one rank's part."""


@dataclass(frozen=True)
class Transfer:
    """One purpose's traffic.

    Attributes:
        what: "gradients", "weights", "maxima", "momentum", "norms", "flags" or "layers".
        collective: as torch calls it.
        scope: of the ranks: data-parallel, tensor-parallel or all of them.
        ranks: how many those are.
        handed_bytes: that each rank hands in, in a step.
        calls: collectives in a step; of `reduce`, to each owner, as many at least.
    """

    what: str
    collective: str
    scope: Scope
    ranks: int
    handed_bytes: int
    calls: int

    @property
    def sent_bytes(self) -> float:
        """That each rank sends on a ring."""
        return self.handed_bytes * _RING[self.collective](self.ranks)


def transfers_of(
    wrapper: Wrapper,
    optimizer: Optimizer,
    exchange: Exchange,
    sizes: Sizes,
    spread: Spread,
    layers: MicroBatch,
) -> list[Transfer]:
    """All traffic of a step, without what has nobody to go to.

    Args:
        layers: one micro-batch, with what tensor-parallel ranks send in it.
    """
    ranks, tensor_ranks, accumulation = spread.ranks, spread.tensor_ranks, spread.accumulation
    ranks_of: dict[Scope, int] = {"data": ranks, "tensor": tensor_ranks, "all": ranks * tensor_ranks}
    found: list[Transfer] = []

    def add(what: str, collective: str, scope: Scope, handed: int, calls: int) -> None:
        if ranks_of[scope] > 1 and handed:
            found.append(Transfer(what, collective, scope, ranks_of[scope], handed, calls))

    buckets = _buckets(wrapper, sizes, layers, ranks)
    times = wrapper.reductions(accumulation)
    collective = "reduce" if wrapper.to_owner else "all-reduce"
    handed = times * sum(buckets) * wrapper.communication.itemsize
    add("gradients", collective, "data", handed, times * len(buckets))
    if wrapper.shards:
        add("weights", "all-gather", "data", wrapper.dtype.itemsize * sizes.partition(ranks), len(sizes.groups))
    if optimizer.norm is not None:
        norms = "all-reduce" if optimizer.norm.name == "max" else "all-gather"
        add("maxima", norms, "data", optimizer.slot_bytes * exchange.data_slots, 1)
        add("maxima", norms, "tensor", optimizer.slot_bytes * exchange.tensor_slots, 1)
    if optimizer.momentum:
        collective = "all-to-all" if optimizer.momentum == "pieces" else "all-reduce"
        add("momentum", collective, "data", exchange.momentum_bytes, exchange.momentum_calls)
    for scope, scalars in _scalars(wrapper, len(sizes.groups)).items():
        add("norms", "all-reduce", scope, sum(scalars), len(scalars))
    # The trainer asks for signals in every micro-batch but the last, and after the step for these and two more flags.
    add("flags", "all-reduce", "all", 4 * (accumulation - 1) + 4 * 3, accumulation)
    for collective, handed in layers.tensor_bytes.items():
        add("layers", collective, "tensor", accumulation * handed, accumulation * layers.tensor_calls[collective])
    return found


def _buckets(wrapper: Wrapper, sizes: Sizes, layers: MicroBatch, ranks: int) -> list[int]:
    """Elements of each reduction: ZeRO-2 takes gradients as they come, the others by the groups."""
    if wrapper.kind == "BF16_Optimizer":
        flats = [zero_bounds(sum(group), ranks)[-1] for group in sizes.groups]
        return engine_buckets(flats, wrapper.bucket)
    if wrapper.kind == "DeepSpeedZeroOptimizer":
        order = [span.elements for span in layers.spans] if wrapper.stage == 2 else sizes.in_order
        return zero_buckets(order, wrapper.bucket)
    return engine_buckets(sizes.in_order, wrapper.bucket)


def _scalars(wrapper: Wrapper, groups: int) -> dict[Scope, list[int]]:
    """Bytes of the gradient norm's parts and of the overflow flag."""
    number, flag = 4, 1
    if wrapper.kind == "none":
        both: list[int] = [number] if wrapper.clips else []
        return {"data": both, "tensor": both}
    if wrapper.kind == "BF16_Optimizer":
        return {"tensor": [number]}
    if wrapper.kind == "float32 copies":
        return {}
    each = [flag] * wrapper.checks_overflow + [number] * groups * wrapper.norms
    return {"data": each, "tensor": each}
