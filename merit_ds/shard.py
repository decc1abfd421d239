# SPDX-License-Identifier: Apache-2.0
"""One tensor of an optimizer's group, and the logical matrices that lie in it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merit_ds.layout import Matrix, ShardLayout
from merit_ds.megatron import split_axis

MATRIX_VIEWS = "'stack', 'flatten' or ('qkv', query rows, head rows)"
MARKS = ("matrix_view", "no_weight_decay", "no_trust_ratio")
"""What an attribute of a parameter or, where it has none, a key of its group says of its matrices."""


@dataclass(frozen=True)
class Shard:
    """One tensor of an optimizer's group, and what it holds.

    Attributes:
        tensor: the float tensor that a step changes; any shape, contiguous.
        layout: its fragments, by element of the flattened tensor.
        matrices: the logical weights of the whole group of ranks, for reports.
        owners: for each of `matrices` the parameter that it is of.
        wrapper: who put the tensor in the parameters' place, "none" for nobody.
        group: the data-parallel ranks to exchange maxima with; None where every weight is whole.
        tensor_group: the tensor-parallel ranks to exchange maxima with; None where no weight is split.
        problem: why this rank must refuse, else None. Found on one rank only, it is told to the others in
            the exchange, so that none is left waiting.
        idle: it is of a frozen parameter, which may be of any dtype and shape: no matrices are made of it until it is
            trained.
    """

    tensor: Tensor
    layout: ShardLayout
    matrices: tuple[Matrix, ...]
    wrapper: str
    owners: tuple[Tensor, ...] = ()
    group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    problem: str | None = None
    idle: bool = False


def is_trained(parameter: Tensor) -> bool:
    """Whether a step is to look at it: it is not frozen, or has a gradient all the same."""
    return parameter.requires_grad or parameter.grad is not None


def own_parts(shard: Shard, values: Mapping[int, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """What a shard's tensor holds of whole parameters, as runs of elements: where in the flattened tensor, and which.

    Args:
        values: by `id` of a parameter, a tensor of its shape; parameters without one are left out.
    """
    starts: dict[int, int] = {}
    owners: dict[int, Tensor] = {}
    for matrix, owner in zip(shard.matrices, shard.owners, strict=True):
        owners[id(matrix)] = owner
        starts[id(owner)] = min(starts.get(id(owner), matrix.start), matrix.start)
    for fragment in (*shard.layout.cut, *shard.layout.whole):
        owner = owners[id(fragment.matrix)]
        if id(owner) not in values:
            continue
        flat = values[id(owner)].reshape(-1)
        for piece in fragment.rectangles():
            size = piece.rows * piece.cols
            first = piece.offset + fragment.begin - starts[id(owner)]
            yield slice(piece.offset, piece.offset + size), flat[first : first + size]


def full_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also while ZeRO-3 has taken its values away and left it with none."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def logical_matrices(parameter: Tensor, param_group: dict[str, Any], *, start: int = 0) -> list[Matrix]:
    """The matrices of which one parameter consists; none if it has no elements.

    Attributes of the parameter or, where it has none, keys of its group decide about it: `matrix_view`,
    `no_weight_decay` and `no_trust_ratio`. (fully_shard makes new parameters without them: set them afterwards.)
    They are read in the first step: an attribute that is set later changes nothing until a state is loaded.
    The group's `elementwise` and `whole_bound` say which ratios count.
    A `matrix_view` is
    - "stack": [E, R, C] is E matrices, as experts are;
    - "flatten": [O, I, kH, kW] is the matrix [O, I*kH*kW], as a convolution is;
    - ("qkv", query rows, head rows): for each query group that many rows of Q, then one head's rows each of K and of V,
      as Megatron-core fuses them; three matrices.

    Args:
        parameter: any shape; three or more dimensions need a view.
        start: the parameter's first element in the flat buffer.

    Raises:
        ValueError: three or more dimensions without a view, a view that is unknown or does not fit, or a
            tensor-parallel weight with more than two dimensions.
    """
    if full_shape(parameter).numel() == 0:
        return []
    rule: dict[str, Any] = {
        "split": split_axis(parameter),
        "decayed": not _mark(parameter, param_group, "no_weight_decay"),
        "scaled": not _mark(parameter, param_group, "no_trust_ratio"),
        "elementwise": param_group.get("elementwise", True),
        "whole_bound": param_group.get("whole_bound", True),
    }
    return [replace(matrix, **rule) for matrix in _viewed(parameter, param_group, start)]


def layout_settings(param_group: dict[str, Any]) -> dict[str, Any]:
    """What a group says to `logical_matrices`, and of the norm; a change of it afterwards would be passed over."""
    view = param_group.get("matrix_view")
    return {
        "matrix_view": tuple(view) if isinstance(view, list) else view,
        "no_weight_decay": bool(param_group.get("no_weight_decay")),
        "no_trust_ratio": bool(param_group.get("no_trust_ratio")),
        "elementwise": param_group.get("elementwise", True),
        "whole_bound": param_group.get("whole_bound", True),
        "norm": param_group.get("norm"),
    }


def is_matrix_view(view: Any) -> bool:
    """Whether it is one of MATRIX_VIEWS."""
    if isinstance(view, (tuple, list)):
        return len(view) == 3 and view[0] == "qkv" and all(isinstance(size, int) and size > 0 for size in view[1:])
    return view in ("stack", "flatten")


def _mark(parameter: Tensor, param_group: dict[str, Any], name: str) -> Any:
    value = getattr(parameter, name, None)
    return param_group.get(name) if value is None else value


def _viewed(parameter: Tensor, param_group: dict[str, Any], start: int) -> list[Matrix]:
    shape, view = full_shape(parameter), _mark(parameter, param_group, "matrix_view")
    if len(shape) < 2:
        return [Matrix(start, 1, shape.numel(), is_vector=True)]
    if len(shape) == 2:
        fused = isinstance(view, (tuple, list))
        return _fused_qkv(start, *shape, view) if fused else [Matrix(start, *shape)]
    if view == "flatten":
        return [Matrix(start, shape[0], math.prod(shape[1:]))]
    if view == "stack":
        rows, cols = shape[-2:]
        return [Matrix(begin, rows, cols) for begin in range(start, start + shape.numel(), rows * cols)]
    raise ValueError(
        f"a parameter of shape {tuple(shape)} has matrix_view {view!r}: set the parameter's attribute or its group's "
        "key matrix_view to 'stack' (the last two dimensions are a matrix) or 'flatten' (a row per first index)"
    )


def _fused_qkv(start: int, rows: int, cols: int, view: Any) -> list[Matrix]:
    """Q, K and V, whose rows alternate by query group."""
    query_rows, head_rows = view[1:] if is_matrix_view(view) else (0, 0)
    pitch = query_rows + 2 * head_rows
    if not pitch or rows % pitch:
        raise ValueError(
            f"a parameter of shape {(rows, cols)} does not consist of query groups by matrix_view {view!r}"
        )
    bands = ((0, query_rows), (query_rows, head_rows), (query_rows + head_rows, head_rows))
    return [Matrix(start + first * cols, rows // pitch * band, cols, band=band, pitch=pitch) for first, band in bands]
