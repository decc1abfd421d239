# SPDX-License-Identifier: Apache-2.0
"""What Merit sends, computed from shapes alone: no processes, no memory for the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merit_ds.layout import Matrix, ShardLayout
from merit_ds.shard import logical_matrices

_BYTES = 2 * 4  # |w| and |u|, float32


@dataclass(frozen=True)
class Payload:
    """One data-parallel group's `step()`.

    Attributes:
        maxima_bytes: of the buffer that each rank hands to the all-reduce; 0 on one rank, which sends nothing.
        gradient_bytes: of the bf16 gradients that each rank hands to ZeRO's reduce-scatter.
    """

    maxima_bytes: int
    gradient_bytes: int

    @property
    def share(self) -> float:
        """Maxima by gradients."""
        return self.maxima_bytes / self.gradient_bytes


def flat_matrices(parameters: Sequence[Tensor], *, settings: dict[str, Any] | None = None) -> tuple[list[Matrix], int]:
    """The logical matrices of ZeRO-1/2's flat buffer of one group, and its elements without padding.

    Args:
        parameters: in the group's order, on any device, "meta" too; frozen ones are left out, as ZeRO does.
        settings: the group's; Merit's by default.
    """
    matrices: list[Matrix] = []
    length = 0
    for parameter in parameters:
        if parameter.requires_grad:
            matrices += logical_matrices(parameter, settings or {}, start=length)
            length += parameter.numel()
    return matrices, length


def zero_bounds(length: int, ranks: int) -> list[int]:
    """Boundaries of ZeRO-1/2's equal slices; DeepSpeed pads the buffer to a multiple of 2 * ranks elements."""
    size = 2 * -(-length // (2 * ranks))
    return [rank * size for rank in range(ranks + 1)]


def payload(parameters: Sequence[Tensor], *, ranks: int) -> Payload:
    """What one group's step sends under ZeRO-1 and 2.

    Args:
        parameters: as for `flat_matrices`.
        ranks: data-parallel ranks.
    """
    matrices, length = flat_matrices(parameters)
    layout = ShardLayout.build(matrices, bounds=zero_bounds(length, ranks), rank=0)
    return Payload(_BYTES * layout.exchange_size if ranks > 1 else 0, 2 * length)
