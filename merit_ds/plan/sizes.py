# SPDX-License-Identifier: Apache-2.0
"""How large the parameters are, and over how many ranks and micro-batches a step is spread."""

from dataclasses import dataclass
from itertools import accumulate

from merit_ds.payload import zero_bounds


@dataclass(frozen=True)
class Spread:
    """How a step is shared.

    Attributes:
        ranks: data-parallel ones, which hold slices of the optimizer's state.
        tensor_ranks: that share each layer.
        accumulation: micro-batches of a step on one data-parallel rank.
    """

    ranks: int
    tensor_ranks: int
    accumulation: int


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
    def in_order(self) -> list[int]:
        """All that are trained."""
        return [size for group in self.groups for size in group]

    def padded(self, ranks: int) -> int:
        """Elements of ZeRO's flat buffers."""
        return ranks * self.partition(ranks)

    def partitions(self, ranks: int) -> list[int]:
        """Elements of a rank's slice of each group."""
        return [zero_bounds(sum(sizes), ranks)[1] for sizes in self.groups]

    def partition(self, ranks: int) -> int:
        """Of all of them."""
        return sum(self.partitions(ranks))

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
