# SPDX-License-Identifier: Apache-2.0
"""Sums and maxima over ranks: whatever is measured in a sample, in one all-reduce of each kind."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Result = Callable[[], Tensor]
"""Gives a reduced float64 tensor on the CPU, once `Reduction.run` has returned."""


class Reduction:
    """Collects small tensors, then reduces them all together, in float64.

    Every rank of the group adds tensors of the same shapes in the same order.

    Args:
        device: where the group's backend can reduce.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: list[Tensor] = []
        self._maxima: list[Tensor] = []

    def sum(self, values: Tensor) -> Result:
        """Add up over the ranks."""
        return self._add(self._sums, values)

    def maximum(self, values: Tensor) -> Result:
        """The largest over the ranks; NaN where one has NaN."""
        return self._add(self._maxima, values)

    def run(self, group: dist.ProcessGroup | None) -> None:
        """Reduce over a group; None where this rank is alone. A collective."""
        sums, maxima = self._flat(self._sums), self._flat(self._maxima)
        if group is not None:
            # A backend's maximum may drop a NaN: they travel as counts among the sums.
            unknown = maxima.isnan()
            both = torch.cat([sums, unknown.double()])
            dist.all_reduce(both, group=group)
            maxima = maxima.masked_fill(unknown, -torch.inf)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            sums, counts = torch.split(both, [sums.numel(), maxima.numel()])
            maxima = maxima.masked_fill(counts > 0, torch.nan)
        self._spread(self._sums, sums.cpu())
        self._spread(self._maxima, maxima.cpu())

    def _add(self, tensors: list[Tensor], values: Tensor) -> Result:
        tensors.append(values.to(self._device, torch.float64))
        index = len(tensors) - 1
        return lambda: tensors[index]

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=self._device), *(t.flatten() for t in tensors)])

    @staticmethod
    def _spread(tensors: list[Tensor], flat: Tensor) -> None:
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        tensors[:] = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
