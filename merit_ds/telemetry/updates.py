# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step does: trust ratios, clipping, and where the whole weight's ratio decides.

The optimizer shows each rank its pieces of every weight, between the exchange of norms and the change of the weights.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merit_ds.inspection import Observed
from merit_ds.megatron import tensor_parallel_group
from merit_ds.telemetry.reduction import Reduction, Result
from merit_ds.telemetry.values import OF_UPDATES


class UpdateTotals:
    """Adds up what one rank sees of a step, by parameter of the model.

    An element of a weight that is not sharded, or not split, is seen by several ranks, and counts on each. All
    elements of a parameter are seen equally often, so its means and shares are right.

    Args:
        model: whose parameters the optimizer was constructed with.
        wanted: names of values; others than those in OF_UPDATES are left alone.
        device: where ranks can reduce.
    """

    def __init__(self, model: nn.Module, wanted: Collection[str], *, device: torch.device) -> None:
        self._wanted = wanted
        named = list(model.named_parameters())
        self._names = [name for name, _ in named]
        group = tensor_parallel_group()
        ranks = 1 if group is None else dist.get_world_size(group)
        self._elements = {
            name: parameter.numel() * (ranks if getattr(parameter, "tensor_model_parallel", False) else 1)
            for name, parameter in named
        }
        self._index = {id(parameter): index for index, (_, parameter) in enumerate(named)}
        # Elements, their ratios; those that may be clipped, those that are; those that have a whole weight's ratio
        # beside others, those where it decides. Of what is not wanted 0.
        self._sums = torch.zeros(len(named), 6, dtype=torch.float64, device=device)
        # The smallest ratio, negated, and the largest.
        self._extremes = torch.full((len(named), 2), -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, pieces: Iterable[Observed]) -> None:
        """Look at the pieces of one call of the optimizer's `step`."""
        for piece in pieces:
            index, elements = self._index[id(piece.owner)], piece.update.numel()
            ratio = piece.ratio.expand_as(piece.update)
            total: Tensor | int = 0
            clipped: tuple[Tensor | int, ...] = (0, 0)
            whole: tuple[Tensor | int, ...] = (0, 0)
            if "ratios" in self._wanted:
                total = ratio.sum(dtype=torch.float64)
                extremes = self._stack(-piece.ratio.amin(), piece.ratio.amax())
                self._extremes[index] = torch.maximum(self._extremes[index], extremes)
            if "clipped_share" in self._wanted:
                reached = ((ratio * piece.update).abs_() >= piece.clip).sum()
                clipped = elements * (piece.clip < torch.inf), reached
            # A ratio that is a scalar is the whole weight's, with no others beside it.
            if "whole_share" in self._wanted and piece.whole is not None and piece.ratio.dim():
                whole = elements, torch.eq(ratio, piece.whole).sum()
            self._sums[index] += self._stack(elements, total, *clipped, *whole)

    def add_to(self, reduction: Reduction) -> None:
        """Have the totals of all ranks reduced."""
        self._all_sums: Result = reduction.sum(self._sums)
        self._all_extremes: Result = reduction.maximum(self._extremes)

    def values(self) -> dict[str, dict[str, Any]]:
        """`ratios`, `clipped_share` and `whole_share` by parameter, as far as wanted, once the reduction has run, and
        `elements`: how many of them each of these parameters has, to weight the shares by.

        A parameter that was not stepped is left out; so is, from `clipped_share`, one that is never clipped, and from
        `whole_share` one that has no such ratio beside others: a vector, or any weight of a rule with the whole
        weight's ratio alone or without it.
        """
        values: dict[str, dict[str, Any]] = {value: {} for value in sorted(OF_UPDATES.intersection(self._wanted))}
        sizes = {}
        totals = zip(self._names, self._all_sums().tolist(), self._all_extremes().tolist(), strict=True)
        for name, (elements, ratio, clippable, reached, bounded, decided), (smallest, largest) in totals:
            if not elements:
                continue
            sizes[name] = self._elements[name]
            found: dict[str, Any] = {"ratios": [-smallest, ratio / elements, largest]}
            if clippable:
                found["clipped_share"] = reached / clippable
            if bounded:
                found["whole_share"] = decided / bounded
            for value in values.keys() & found:
                values[value][name] = found[value]
        return values | {"elements": sizes}

    def _stack(self, *numbers: Tensor | float) -> Tensor:
        device = self._sums.device
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
