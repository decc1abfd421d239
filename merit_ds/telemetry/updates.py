# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step does: trust ratios, clipping, and where the whole weight's ratio decides.

The optimizer shows each rank its pieces of every weight, between the exchange of norms and the change of the weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from merit_ds.inspection import Observed
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
        self._matrices = [parameter.dim() > 1 for _, parameter in named]
        self._index = {id(parameter): index for index, (_, parameter) in enumerate(named)}
        # Elements, their ratios, the clipped ones; those that have a whole weight's ratio, those where it decides.
        self._sums = torch.zeros(len(named), 5, dtype=torch.float64, device=device)
        # The smallest ratio, negated, and the largest.
        self._extremes = torch.full((len(named), 2), -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, pieces: Iterable[Observed]) -> None:
        """Look at the pieces of one call of the optimizer's `step`."""
        for piece in pieces:
            index, elements = self._index[id(piece.owner)], piece.update.numel()
            ratio = piece.ratio.expand_as(piece.update)
            clipped = ((ratio * piece.update).abs_() >= piece.clip).sum()
            bounded, decided = (0, 0) if piece.whole is None else (elements, (ratio == piece.whole).sum())
            self._sums[index] += self._stack(elements, ratio.sum(dtype=torch.float64), clipped, bounded, decided)
            extremes = self._stack(-piece.ratio.amin(), piece.ratio.amax())
            self._extremes[index] = torch.maximum(self._extremes[index], extremes)

    def add_to(self, reduction: Reduction) -> None:
        """Have the totals of all ranks reduced."""
        self._all_sums: Result = reduction.sum(self._sums)
        self._all_extremes: Result = reduction.maximum(self._extremes)

    def values(self) -> dict[str, dict[str, Any]]:
        """`ratios`, `clipped_share` and `whole_share` by parameter, once the reduction has run.

        A parameter that was not stepped is left out; so is, from `whole_share`, one that has no such ratio beside
        others: a vector, or any weight where the rule leaves out the whole weight's bound.
        """
        ratios, clipped, whole = {}, {}, {}
        totals = zip(self._names, self._matrices, self._all_sums().tolist(), self._all_extremes().tolist(), strict=True)
        for name, is_matrix, (elements, ratio, reached, bounded, decided), (smallest, largest) in totals:
            if not elements:
                continue
            ratios[name] = [-smallest, ratio / elements, largest]
            clipped[name] = reached / elements
            if is_matrix and bounded:
                whole[name] = decided / bounded
        return {"ratios": ratios, "clipped_share": clipped, "whole_share": whole}

    def _stack(self, *numbers: Tensor | float) -> Tensor:
        device = self._sums.device
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
