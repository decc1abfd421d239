# SPDX-License-Identifier: Apache-2.0
"""Telemetry in the trainer's step: what is measured when, and where it goes."""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from merit_ds.megatron import tensor_parallel_group
from merit_ds.sharded import ShardedOptimizer
from merit_ds.telemetry.attention import AttentionWatch
from merit_ds.telemetry.reduction import Reduction
from merit_ds.telemetry.updates import UpdateTotals
from merit_ds.telemetry.values import OF_ATTENTION, OF_UPDATES, OF_WEIGHTS, VALUES
from merit_ds.telemetry.weights import weight_values
from merit_ds.training.plan import Plan

Row = dict[str, Any]


def make_telemetry(engine: Any, plan: Plan, *, record: Callable[[Row], None] | None) -> "Telemetry | None":
    """The run's telemetry, as its recipe asks for it; None where that is switched off, or where nobody would read it.

    Args:
        record: takes each sample's row; None where the run has no folder.
    """
    settings = plan.config.telemetry
    if not settings.interval or (record is None and not engine.monitor.enabled):
        return None
    wanted = VALUES if settings.values is None else settings.values
    return Telemetry(engine, wanted=wanted, interval=settings.interval, device=plan.device, record=record)


class Telemetry:
    """Samples the first of a run's steps and every `interval`-th. It changes nothing of what the run computes.

    A sample describes one step: the attention in this rank's first micro-batch, the weights with which it was
    computed, and what the optimizer then did to them. Between samples nothing of this is in the way of a step. All
    ranks call both methods.

    Args:
        engine: DeepSpeed's, with a Megatron-core `GPTModel`.
        wanted: names from VALUES. An optimizer that has no trust ratios to show gives none of those in OF_UPDATES.
        interval: steps between two samples.
        device: where ranks can reduce.
        record: called with each row, on rank 0 alone; None for the monitors alone.
    """

    def __init__(
        self,
        engine: Any,
        *,
        wanted: Collection[str],
        interval: int,
        device: torch.device,
        record: Callable[[Row], None] | None,
    ) -> None:
        self._engine = engine
        self._wanted = set(wanted)
        self._interval = interval
        self._device = device
        self._record = record
        self._attention: AttentionWatch | None = None
        self._updates: UpdateTotals | None = None
        self._weights: Row | None = None

    def before_step(self, step: int) -> None:
        """Make ready for step number `step`, from 1 on, if it is to be sampled.

        Raises:
            UnsupportedError: a value is wanted that the model's modules do not show.
        """
        if step != 1 and step % self._interval:
            return
        model, optimizer = self._engine.module, self._engine.basic_optimizer
        if self._wanted & OF_ATTENTION:
            self._attention = AttentionWatch(model, self._wanted)
        if self._wanted & OF_UPDATES and isinstance(optimizer, ShardedOptimizer) and optimizer.rule.norm is not None:
            self._updates = UpdateTotals(model, self._wanted, device=self._device)
            optimizer.inspect = self._updates.add
        self._weights = {}
        # Data-parallel ranks hold the same weights: the ranks of the first of them are enough.
        if self._wanted & OF_WEIGHTS and parallel_state.get_data_parallel_rank() == 0:
            group = tensor_parallel_group()
            self._weights = weight_values(model, self._wanted & OF_WEIGHTS, group=group, device=self._device)

    def after_step(self, step: int, *, samples: int) -> None:
        """Bring together what the ranks saw of the step, and write it, if it was sampled.

        Args:
            samples: sequences that the run has consumed, which monitors count by.
        """
        if self._weights is None:
            return
        values, self._weights = self._weights, None
        reduction = Reduction(self._device)
        sources = [source for source in (self._attention, self._updates) if source is not None]
        for source in sources:
            source.add_to(reduction)
        reduction.run(dist.group.WORLD)
        for source in sources:
            values |= source.values()
        if self._updates is not None:
            self._engine.basic_optimizer.inspect = None
        self._attention = self._updates = None
        if dist.get_rank() == 0:
            row = {"iteration": step} | {
                name: _rounded(values[name]) for name in VALUES if name in values and name in self._wanted
            }
            if {"clipped_share", "whole_share"} & row.keys():
                row["elements"] = values["elements"]
            if self._record is not None:
                self._record(row)
            if self._engine.monitor.enabled:
                self._engine.monitor.write_events(events(row, samples=samples))


def events(row: Row, *, samples: int) -> list[tuple[str, float, int]]:
    """A row for DeepSpeed's monitors, with a tag `Telemetry/VALUE/...` for every number.

    By layer they end in `layer_00` and so on, from the first; by parameter in its name.
    """
    found: list[tuple[str, float, int]] = []
    for value, content in row.items():
        if value in ("iteration", "elements"):
            continue
        named = {"": content}
        if isinstance(content, list):
            named = {f"/layer_{index:02d}": number for index, number in enumerate(content)}
        elif isinstance(content, dict):
            named = {f"/{name}": number for name, number in content.items()}
        for name, number in named.items():
            parts = zip(("_min", "_mean", "_max"), number, strict=True) if isinstance(number, list) else [("", number)]
            found += [(f"Telemetry/{value}{part}{name}", float(one), samples) for part, one in parts]
    return found


def _rounded(value: Any) -> Any:
    """To seven digits, which is what the float32 behind it holds, for a shorter file."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.7g}")
