# SPDX-License-Identifier: Apache-2.0
"""One tensor of an optimizer's group, and the logical matrices that lie in it."""

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from merit_ds.layout import Matrix, ShardLayout

MATRIX_VIEWS = ("stack", "flatten")


@dataclass(frozen=True)
class Shard:
    """One tensor of an optimizer's group, and what it holds.

    Attributes:
        tensor: the float tensor that a step changes; any shape, contiguous.
        layout: its fragments, by element of the flattened tensor.
        matrices: the logical weights of the whole group of ranks, for reports.
        wrapper: who put the tensor in the parameters' place, "none" for nobody.
        group: the ranks to exchange maxima with; None where every weight is whole.
        problem: why this rank must refuse, else None. Found on one rank only, it is told to the others in
            the exchange, so that none is left waiting.
    """

    tensor: Tensor
    layout: ShardLayout
    matrices: tuple[Matrix, ...]
    wrapper: str
    group: dist.ProcessGroup | None = None
    problem: str | None = None


def logical_matrices(parameter: Tensor, param_group: dict[str, Any], *, start: int = 0) -> list[Matrix]:
    """The matrices of which one parameter consists; none if it has no elements.

    Args:
        parameter: any shape. Three or more dimensions need a `matrix_view`: an attribute of the parameter or a key of
            its group, "stack" ([E, R, C] is E matrices, as experts are) or "flatten" ([O, I, kH, kW] is the
            matrix [O, I*kH*kW], as a convolution is).
        start: the parameter's first element in the flat buffer.

    Raises:
        ValueError: three or more dimensions without a view, or an unknown view.
    """
    if parameter.numel() == 0:
        return []
    shape = parameter.shape
    if len(shape) < 2:
        return [Matrix(start, 1, parameter.numel(), is_vector=True)]
    if len(shape) == 2:
        return [Matrix(start, shape[0], shape[1])]
    view = getattr(parameter, "matrix_view", None) or param_group.get("matrix_view")
    if view == "flatten":
        return [Matrix(start, shape[0], math.prod(shape[1:]))]
    if view == "stack":
        rows, cols = shape[-2:]
        return [Matrix(begin, rows, cols) for begin in range(start, start + parameter.numel(), rows * cols)]
    raise ValueError(
        f"a parameter of shape {tuple(shape)} has matrix_view {view!r}: set the parameter's attribute or its group's "
        "key matrix_view to 'stack' (the last two dimensions are a matrix) or 'flatten' (a row per first index)"
    )
