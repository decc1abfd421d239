# SPDX-License-Identifier: Apache-2.0
"""What every kernel works from: tensors, a table of rectangles with the slots of their maxima, and rows of scalars.

They mirror the structs of `merit_ds/csrc/merit_abi.h`. The table depends on the layout alone and is built once.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights and gradients."""


class Operands(NamedTuple):
    """The tensors of a step, all on one device: what this rank holds of each, contiguous, of any shape.

    Attributes:
        weights, grads: float32, bfloat16 or float16. What has no gradient is left alone.
        exp_avgs, exp_avg_sqs: the moments, float32; without a gradient they may be missing. Empty where a rule has
            no such moment.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    exp_avgs: Sequence[Tensor | None] = ()
    exp_avg_sqs: Sequence[Tensor | None] = ()

    def of(self, numbers: Sequence[int]) -> "Operands":
        """Those of some of the tensors."""
        weights = [self.weights[number] for number in numbers]
        return Operands(weights, *([tensors[number] for number in numbers] if tensors else () for tensors in self[1:]))


def check_operands(operands: Operands, *, sizes: Sequence[int], device: torch.device, moments: int = 2) -> None:
    """Raise ValueError for tensors that a kernel cannot take.

    Args:
        sizes: the elements that each weight must have.
        device: where all must lie.
        moments: how many the rule has.
    """
    present = operands[: 2 + moments]
    counts = [len(tensors) for tensors in present]
    if any(count != len(sizes) for count in counts):
        raise ValueError(f"Merit: {counts} weights, gradients, first and second moments are not {len(sizes)} of each")
    _check_tensors(present, sizes=sizes, device=device)


def _check_tensors(present: Sequence[Sequence[Tensor | None]], *, sizes: Sequence[int], device: torch.device) -> None:
    for size, weight, grad, *moments in zip(sizes, *present, strict=True):
        if grad is not None and any(moment is None for moment in moments):
            raise ValueError("Merit: a weight has a gradient and no moments")
        for tensor, dtypes in ((weight, DTYPES), (grad, DTYPES), *((moment, (torch.float32,)) for moment in moments)):
            if tensor is not None:
                _check_tensor(tensor, dtypes, size, device)


def _check_tensor(tensor: Tensor, dtypes: Sequence[torch.dtype], size: int, device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"Merit: a tensor is {tensor.dtype}, but it must be one of {dtypes}")
    if tensor.device != device or not tensor.is_contiguous() or tensor.numel() != size:
        raise ValueError(
            f"Merit: a weight, its gradient and its moments must be contiguous, of {size} elements, on {device}, and "
            f"one of {tuple(tensor.shape)} on {tensor.device} is not: was its .data replaced after the first step?"
        )


class Tile(NamedTuple):
    """A rectangle of one logical matrix in one tensor: `rows` runs of `cols` elements, each `pitch` after the last.

    Attributes:
        tensor: which of the step's tensors.
        offset: of its first element in that tensor.
        row_slot, col_slot: slots of its first row's and its first column's maxima; the others' follow. -1 where the
            matrix has none: a vector, or a matrix without a trust ratio.
        whole_slot: slot of the whole weight's maxima, a matrix's own; -1 without a trust ratio. A `step` takes the
            tiles that have it one after the other, from one tensor, for a kernel to finish a matrix before the next.
        hyper: which row of scalars.
    """

    tensor: int
    offset: int
    pitch: int
    rows: int
    cols: int
    row_slot: int
    col_slot: int
    whole_slot: int
    hyper: int

    def part(self, row: int, col: int, *, rows: int, cols: int) -> "Tile":
        """The rectangle of `rows` by `cols` elements that begins at a row and a column of this one."""
        return self._replace(
            offset=self.offset + row * self.pitch + col,
            rows=rows,
            cols=cols,
            row_slot=self.row_slot + row if self.row_slot >= 0 else -1,
            col_slot=self.col_slot + col if self.col_slot >= 0 else -1,
        )


class Scalars(NamedTuple):
    """A step's scalars. Of the two eps one is zero; without clipping, clip is infinite."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps_inside: Any
    eps_outside: Any
    weight_decay: Any
    lr: Any
    clip: Any


KINDS = 3
"""Rows of scalars a group: for matrices, for vectors, for what is never decayed."""
MATRIX, VECTOR, UNDECAYED = range(KINDS)


def lr_on_device(group: dict[str, Any]) -> Tensor | None:
    """A group's learning rate, if it is a tensor that the host would have to wait for."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None


def host_lr(group: dict[str, Any]) -> float:
    """A group's learning rate; NaN for one on a device, which is for the caller to copy there."""
    return float(group["lr"]) if lr_on_device(group) is None else math.nan


def scalars_of(group: dict[str, Any]) -> list[Scalars]:
    """A group's rows, by kind, as Python doubles; whoever makes a tensor of them rounds once to float32."""
    beta1, beta2 = group["betas"]
    eps, inside = float(group["eps"]), group["eps_inside_sqrt"]
    matrix = Scalars(
        beta1=float(beta1),
        one_minus_beta1=1.0 - beta1,
        beta2=float(beta2),
        one_minus_beta2=1.0 - beta2,
        eps_inside=eps if inside else 0.0,
        eps_outside=0.0 if inside else eps,
        weight_decay=float(group["weight_decay"]),
        lr=host_lr(group),
        clip=math.inf if group["clip"] is None else float(group["clip"]),
    )
    return by_kind(matrix, group)


def by_kind(matrix: Any, group: dict[str, Any]) -> list[Any]:
    """The rows of a group by kind, from its scalars for matrices, a named tuple with a `weight_decay`."""
    undecayed = matrix._replace(weight_decay=0.0)
    return [matrix, matrix if group["decay_vectors"] else undecayed, undecayed]


def tabulate(tiles: Iterable[Tile]) -> Tensor:
    """The table [tiles, 9], int64, on the CPU."""
    return torch.tensor(list(tiles), dtype=torch.int64, device="cpu").reshape(-1, len(Tile._fields))


def cut_tiles(tiles: Sequence[Tile], *, rows: int, span: int) -> list[Tile]:
    """The same rectangles in tiles of bounded size, for a kernel that gives each to one block of threads.

    Args:
        rows: the most rows of a tile.
        span: the most columns; fewer where the first one's offset is not a multiple of 4, so that
            `cols + offset % 4 <= span`. Where that helps, the following tiles of a row begin at multiples of 4, which a
            kernel can read 16 bytes at a time. A tile of a single row may have `rows * span` columns, so long as no
            maxima of columns are asked for.
    """
    found = []
    for tile in tiles:
        width = span if tile.rows > 1 or tile.col_slot >= 0 else rows * span
        phase = tile.offset % 4
        if tile.rows > 1 and tile.pitch % 4:  # each row begins elsewhere: leave room for any
            width, phase = width - 3, 0
        for col, cols in _runs(tile.cols, width, phase=phase):
            for row in range(0, tile.rows, rows):
                found.append(tile.part(row, col, rows=min(rows, tile.rows - row), cols=cols))
    return found


def _runs(cols: int, width: int, *, phase: int) -> list[tuple[int, int]]:
    """(first column, columns) of the pieces of a row whose first element is `phase` after a multiple of 4."""
    starts = [0, *range(width - phase, cols, width)]
    return [(start, stop - start) for start, stop in zip(starts, [*starts[1:], cols], strict=True)]
