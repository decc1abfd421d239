# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's formula is to the step: two passes over a piece of a weight, with a norm between them.

The first pass sees gradients and changes moments; what it returns is measured beside the weight. The norms of both are
brought together over a matrix's rows, columns and whole, on whatever ranks they lie, and the second pass takes them.
A rule knows nothing of shards, tiles or ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from merit_ds.collectives import Exchange, MaxExchange, SumExchange

Moments = Sequence[Tensor]


class Norm(ABC):
    """How magnitudes are measured: over a piece, over pieces, and over ranks.

    Attributes:
        dtype: of what is brought together.
        exchange: brings the parts of several ranks together.
    """

    name: ClassVar[Literal["max", "l2"]]
    dtype: ClassVar[torch.dtype]
    exchange: ClassVar[type[Exchange]]

    @abstractmethod
    def magnitude(self, tensor: Tensor) -> Tensor:
        """Of each element, a new tensor."""

    @abstractmethod
    def reduce(self, magnitudes: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Magnitudes over some dimensions: a piece's part."""

    @abstractmethod
    def merge(self, target: Tensor, part: Tensor) -> None:
        """Bring a piece's part in, in place."""

    @abstractmethod
    def finish(self, merged: Tensor) -> Tensor:
        """From what was brought together to the norm."""


@dataclass(frozen=True)
class MaxNorm(Norm):
    """The largest magnitude: exact, in whatever order parts come."""

    name = "max"
    dtype = torch.float32
    exchange = MaxExchange

    def magnitude(self, tensor: Tensor) -> Tensor:
        return tensor.abs()

    def reduce(self, magnitudes: Tensor, dims: tuple[int, ...]) -> Tensor:
        return magnitudes.amax(dims)

    def merge(self, target: Tensor, part: Tensor) -> None:
        torch.maximum(target, part, out=target)  # unlike fmax it keeps NaN

    def finish(self, merged: Tensor) -> Tensor:
        return merged


@dataclass(frozen=True)
class L2Norm(Norm):
    """The root of the sum of squares, in float64, in which the square of a float32 is exact."""

    name = "l2"
    dtype = torch.float64
    exchange = SumExchange

    def magnitude(self, tensor: Tensor) -> Tensor:
        return tensor.double().square_()

    def reduce(self, magnitudes: Tensor, dims: tuple[int, ...]) -> Tensor:
        return magnitudes.sum(dims)

    def merge(self, target: Tensor, part: Tensor) -> None:
        target.add_(part)

    def finish(self, merged: Tensor) -> Tensor:
        return merged.sqrt()


MAX, L2 = MaxNorm(), L2Norm()


class Norms(NamedTuple):
    """Of a weight and of what is measured beside it, for a piece of a matrix.

    Attributes:
        whole: [2], of the whole weight.
        rows, cols: [rows, 1, 2] and [1, cols, 2], of the piece's rows and columns; None where they do not count.
    """

    whole: Tensor
    rows: Tensor | None
    cols: Tensor | None


def trust_ratio(norms: Norms) -> Tensor:
    """s: the largest of |w| / |u| over row, column and whole; float32 [rows, cols], or a scalar where the whole counts
    alone. 1 wherever a norm is zero: that rule comes last, over NaN and over the whole-weight ratio.
    """
    whole, rows, cols = norms
    if rows is None or cols is None:
        return torch.where((whole == 0).any(), 1.0, whole[0] / whole[1]).float()
    ratio = torch.maximum(rows[..., 0] / rows[..., 1], cols[..., 0] / cols[..., 1])
    torch.maximum(ratio, whole[0] / whole[1], out=ratio)
    return ratio.masked_fill_((rows == 0).any(2), 1.0).masked_fill_((cols == 0).any(2), 1.0).float()


class Rule(ABC):
    """An optimizer's formula for a piece [rows, cols] of a weight, all in float32. Equal rules compare as equal.

    Attributes:
        hyper: the named tuple of its scalars, with an `lr` among them.
        moments: the names of its state's tensors, in the order in which it takes them; at most two.
        norm: what is measured between the passes; None where nothing is.
        elementwise: the norms of rows and columns count, for a group that does not say otherwise by a key of this name.
        counts_steps: its scalars depend on how often a tensor was stepped before.
    """

    hyper: ClassVar[Any]
    moments: ClassVar[tuple[str, ...]]
    norm: Norm | None = None
    elementwise: bool = False
    counts_steps: bool = False

    @abstractmethod
    def scalars(self, settings: dict[str, Any]) -> list[Any]:
        """A group's scalars, a named tuple each for matrices, vectors and what is never decayed (`table.KINDS`).

        Args:
            settings: the group; where steps count, with `step`, the number of steps done before.
        """

    def accumulate(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Any, *, measured: bool
    ) -> Tensor | None:
        """The first pass: moments in place; returns what is measured beside the weight, if anything is."""
        return None

    @abstractmethod
    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Any, norms: Norms | None) -> Tensor:
        """The second pass, or the only one: returns the new weight.

        Args:
            norms: None where no trust ratio applies (`no_trust_ratio`, or a rule without one).
        """

    def ratio(self, norms: Norms, hyper: Any) -> Tensor:
        """What scales the update: float32, [rows, cols], or a scalar where the whole weight's norms count alone."""
        return trust_ratio(norms)

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Any) -> Tensor:
        """Between the passes: u, what ratio, clip and learning rate will be applied to. For inspection."""
