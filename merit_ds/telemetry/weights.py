# SPDX-License-Identifier: Apache-2.0
"""What the weights alone show: from the model's own parameters, whatever the optimizer.

ZeRO-1/2 keep those whole on each data-parallel rank, in the precision of the forward pass. Tensor-parallel ranks hold
parts of them: what runs across the split is added up.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merit_ds.marks import fused_qkv
from merit_ds.megatron import split_axis
from merit_ds.telemetry.reduction import Reduction, Result

_ELEMENTS = 2**22
"""Elements of a weight that are held in float64 at a time, 32 MiB."""


@torch.no_grad()
def weight_values(
    model: nn.Module, wanted: Collection[str], *, group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Any]:
    """`l2_max_gap`, `row_similarity`, `col_similarity` and `output_operator_norm`, as far as wanted.

    A fused QKV weight counts as three matrices: `NAME.query`, `NAME.key`, `NAME.value`; the gap is of the first two.
    A similarity that is not defined, as in a weight whose elements are all of one size, is left out.

    Args:
        model: Megatron-core's `GPTModel`, tensor-parallel or not.
        wanted: names of values; others than these four are left alone.
        group: the ranks that share its layers; None where nothing is split. A collective of theirs.
        device: where the group's backend can reduce.

    Returns:
        By name of the value, the same on each rank of the group.
    """
    reduction = Reduction(device)
    ranks = 1 if group is None else dist.get_world_size(group)
    every = "row_similarity" in wanted or "col_similarity" in wanted
    gaps = "l2_max_gap" in wanted
    measured = [_Sums(m, reduction, ranks=ranks) for m in _matrices(model) if every or (gaps and m.projects)]
    norm = reduction.maximum(_operator_norm(model)) if "output_operator_norm" in wanted else None
    reduction.run(group)
    values: dict[str, Any] = {}
    if gaps:
        values["l2_max_gap"] = {sums.name: sums.l2_max_gap() for sums in measured if sums.projects}
    for name in ("row_similarity", "col_similarity"):
        if name in wanted:
            found = {sums.name: getattr(sums, name)() for sums in measured}
            values[name] = {matrix: value for matrix, value in found.items() if value is not None}
    if norm is not None:
        values["output_operator_norm"] = float(norm())
    return values


@dataclass(frozen=True)
class _Matrix:
    """A logical weight, or this tensor-parallel rank's part of it; `projects` to queries or to keys."""

    name: str
    weight: Tensor
    split: Literal["rows", "cols"] | None
    projects: bool = False


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    fused = fused_qkv(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        weight, split = parameter.detach(), split_axis(parameter)
        if name not in fused:
            yield _Matrix(name, weight, split)
            continue
        query, head = fused[name]
        groups = weight.view(-1, query + 2 * head, weight.size(1))
        for part, rows in zip(("query", "key", "value"), torch.split(groups, [query, head, head], dim=1), strict=True):
            yield _Matrix(f"{name}.{part}", rows.flatten(0, 1), split, projects=part != "value")


class _Sums:
    """Sums over |w| of one matrix, from which its values follow once they are reduced over the ranks."""

    def __init__(self, matrix: _Matrix, reduction: Reduction, *, ranks: int) -> None:
        self.name, self.projects = matrix.name, matrix.projects
        rows, cols, squares, largest = _line_sums(matrix.weight)
        split = matrix.split
        self._rows = rows.numel() * (ranks if split == "rows" else 1)
        self._cols = cols.numel() * (ranks if split == "cols" else 1)
        add = reduction.maximum if split is None else reduction.sum  # what all ranks hold alike is not added up
        self._total, self._squares = add(rows.sum()), add(squares)
        self._largest = reduction.maximum(largest)

        def squared(sums: Tensor, *, crossing: bool) -> Result:
            if not crossing:
                return add(sums.square().sum())
            total = reduction.sum(sums)  # such a line runs across the ranks: it is added up before it is squared
            return lambda: total().square().sum()

        self._squared_rows = squared(rows, crossing=split == "cols")
        self._squared_cols = squared(cols, crossing=split == "rows")

    def l2_max_gap(self) -> float:
        """(l2 norm - max norm) / l2 norm, figure 10 of arXiv 2508.20577; NaN for a weight of zeros."""
        return float(1 - self._largest() / self._squares().sqrt())

    def row_similarity(self) -> float | None:
        return self._similarity(self._squared_rows(), lines=self._rows, length=self._cols)

    def col_similarity(self) -> float | None:
        return self._similarity(self._squared_cols(), lines=self._cols, length=self._rows)

    def _similarity(self, squared_sums: Tensor, *, lines: int, length: int) -> float | None:
        """The intraclass correlation of |w| with rows (or columns) as classes.

        With d = |w| - mean |w| it is the mean of d_ij d_ik over all pairs of different elements of the same line,
        over all lines, divided by the mean of d^2. 0: elements of a line are no more alike than any two; 1: each
        line's are all of one size; -1 / (length - 1) at least.

        What figure 3 of arXiv 2508.20577 plots for "similarity within rows and columns" is not printed there; this
        is the textbook definition (R. A. Fisher, Statistical Methods for Research Workers, 1925, chapter 7).
        """
        total, squares = float(self._total()), float(self._squares())
        spread = squares - total**2 / (lines * length)
        if length < 2 or spread <= 1e-12 * squares:
            return None
        between = float(squared_sums) - total**2 / lines
        return (between / spread - 1) / (length - 1)


def _line_sums(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of |w|, in float64: the sums of its rows, of its columns, of all squares, and the largest."""
    rows, cols, squares, largest = [], [], [], []
    for piece in _pieces(weight):
        size = piece.double().abs_()
        rows.append(size.sum(1))
        cols.append(size.sum(0))
        largest.append(size.amax())
        squares.append(size.square_().sum())
    return torch.cat(rows), torch.stack(cols).sum(0), torch.stack(squares).sum(), torch.stack(largest).amax()


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows of a matrix, in float64 not too many at a time."""
    return torch.split(weight, max(1, _ELEMENTS // weight.size(1)))


def _operator_norm(model: Any) -> Tensor:
    """The RMS-to-infinity operator norm of the output layer W [rows, d]: sqrt(d) * max_i ||W_i,:||_2.

    It is the largest |logit| that an input of root mean square 1 can have. Source: arXiv 2510.03871, which finds it
    to be the same at the best learning rate and batch size of every model and data size. Here its rows are split over
    the ranks, the vocabulary's padding counts, and the norm layer before it is not part of it.
    """
    weight: Tensor = model.shared_embedding_or_output_weight().detach()
    norms = [torch.linalg.vector_norm(piece.double(), dim=1).amax() for piece in _pieces(weight)]
    return torch.stack(norms).amax() * math.sqrt(weight.size(1))
