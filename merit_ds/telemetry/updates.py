# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step does: trust ratios, clipping, and where the whole weight's ratio decides.

The optimizer shows each rank its pieces of every weight, between the exchange of norms and the change of the weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merit_ds.inspection import Observed
from merit_ds.megatron import tensor_parallel_group
from merit_ds.telemetry.reduction import Reduction, Result


class UpdateTotals:
    """Adds up what one rank sees of a step, by parameter of the model.

    An element of a weight that is not sharded, or not split, is seen by several ranks, and counts on each. All
    elements of a parameter are seen equally often, so its means and shares are right.

    Args:
        model: whose parameters the optimizer was constructed with.
        device: where ranks can reduce.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
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
        # beside others, those where it decides.
        self._sums = torch.zeros(len(named), 6, dtype=torch.float64, device=device)
        # The smallest ratio, negated, and the largest.
        self._extremes = torch.full((len(named), 2), -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, pieces: Iterable[Observed]) -> None:
        """Look at the pieces of one call of the optimizer's `step`."""
        for piece in pieces:
            index, elements = self._index[id(piece.owner)], piece.update.numel()
            ratio = piece.ratio.expand_as(piece.update)
            reached = ((ratio * piece.update).abs_() >= piece.clip).sum()
            whole: tuple[Tensor | int, ...] = (0, 0)
            # A ratio that is a scalar is the whole weight's, with no others beside it.
            if piece.whole is not None and piece.ratio.dim():
                whole = elements, torch.eq(ratio, piece.whole).sum()
            clipped = elements * (piece.clip < torch.inf), reached
            self._sums[index] += self._stack(elements, ratio.sum(dtype=torch.float64), *clipped, *whole)
            extremes = self._stack(-piece.ratio.amin(), piece.ratio.amax())
            self._extremes[index] = torch.maximum(self._extremes[index], extremes)

    def add_to(self, reduction: Reduction) -> None:
        """Have the totals of all ranks reduced."""
        self._all_sums: Result = reduction.sum(self._sums)
        self._all_extremes: Result = reduction.maximum(self._extremes)

    def values(self) -> dict[str, dict[str, Any]]:
        """`ratios`, `clipped_share` and `whole_share` by parameter, once the reduction has run, and `elements`: how
        many of them each of these parameters has, to weight the shares by.

        A parameter that was not stepped is left out; so is, from `clipped_share`, one that is never clipped, and from
        `whole_share` one that has no such ratio beside others: a vector, or any weight of a rule with the whole
        weight's ratio alone or without it.
        """
        ratios, clipped, whole = {}, {}, {}
        totals = zip(self._names, self._all_sums().tolist(), self._all_extremes().tolist(), strict=True)
        for name, (elements, ratio, clippable, reached, bounded, decided), (smallest, largest) in totals:
            if not elements:
                continue
            ratios[name] = [-smallest, ratio / elements, largest]
            if clippable:
                clipped[name] = reached / clippable
            if bounded:
                whole[name] = decided / bounded
        sizes = {name: self._elements[name] for name in ratios}
        return {"ratios": ratios, "clipped_share": clipped, "whole_share": whole, "elements": sizes}

    def _stack(self, *numbers: Tensor | float) -> Tensor:
        device = self._sums.device
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
