# SPDX-License-Identifier: Apache-2.0
"""The operations as `torch.ops.merit_ds.accumulate`, `apply` and `step`, for optimizers of one's own.

They check what they are handed. Merit calls the kernels directly: handing a tensor through the dispatcher to Python
costs 0.16 us, which for a model of 300 unsharded weights is as much as all its other work.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from merit_ds.ops.select import select_kernel
from merit_ds.ops.table import Operands, Scalars, Tile, check_operands

_PURPOSE = {
    "accumulate": "First pass: the moments in place, and maxima raised.",
    "apply": "Second pass, when the maxima are complete: the weights in place.",
    "step": "Both passes, for matrices to whose maxima nobody else contributes; each one's tiles follow each other.",
}


def _define(name: str) -> Callable[..., None]:
    def operation(
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        tiles: Tensor,
        scalars: Tensor,
        maxima: Tensor,
        noop: Tensor | None = None,
    ) -> None:
        operands = Operands(weights, grads, exp_avgs, exp_avg_sqs)
        check(operands, tiles=tiles, scalars=scalars, maxima=maxima, noop=noop)
        if name == "step":
            _check_order(tiles)
        if not tiles.shape[0]:
            return
        kernel = select_kernel(maxima.device)
        table = kernel.table([Tile(*row) for row in tiles.tolist()], maxima.device)
        run = getattr(kernel, name)
        prepare = kernel.preparer([weight.numel() for weight in weights], maxima.device)
        run(prepare(operands), tiles=table, scalars=scalars, maxima=maxima, noop=noop)

    operation.__doc__ = f"{_PURPOSE[name]} Arguments as in `merit_ds.ops.eager`, the operands one by one."
    custom = torch.library.custom_op(
        f"merit_ds::{name}", operation, mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "maxima")
    )
    custom.register_fake(lambda *arguments, **options: None)
    return custom


def check(operands: Operands, *, tiles: Tensor, scalars: Tensor, maxima: Tensor, noop: Tensor | None) -> None:
    """Raise ValueError for arguments with which a kernel would read or write memory that is not theirs."""
    device = maxima.device
    check_operands(operands, sizes=[weight.numel() for weight in operands.weights], device=device)
    _require("scalars", scalars, torch.float32, (None, len(Scalars._fields)), device)
    _require("maxima", maxima, torch.float32, (None, 2), device)
    _require("tiles", tiles, torch.int64, (None, len(Tile._fields)), torch.device("cpu"))
    if noop is not None:
        _require("noop", noop.reshape(-1), torch.float32, (1,), device)
    if tiles.shape[0]:
        _check_bounds(operands, tiles, slots=maxima.shape[0], rows=scalars.shape[0])


def _require(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device
) -> None:
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"merit_ds: {name} must be contiguous, {dtype}, of shape {shape}, on {device}")


def _check_bounds(operands: Operands, tiles: Tensor, *, slots: int, rows: int) -> None:
    """Whether the rectangles lie in the tensors and their maxima in the slots."""
    column = dict(zip(Tile._fields, tiles.unbind(1), strict=True))

    def within(name: str, count: Tensor | int, limit: Tensor | int, *, or_none: bool = False) -> bool:
        """Whether [first, first + count) lies in [0, limit), or the first is -1 where that means none.

        Counts are no larger than a tensor, so that nothing here overflows.
        """
        first = column[name]
        return bool((((first >= 0) & (first <= limit - count)) | ((first == -1) & or_none)).all())

    height, width, pitch = column["rows"], column["cols"], column["pitch"]
    has_rows, has_cols = column["row_slot"] >= 0, column["col_slot"] >= 0
    if not within("tensor", 1, len(operands.weights)):
        raise ValueError("merit_ds: a row of tiles names a tensor that is not there")
    sizes = torch.tensor([weight.numel() for weight in operands.weights], device="cpu")[column["tensor"]]
    fits = (
        bool(
            (
                (height > 0)
                & (width > 0)
                & (pitch >= width)
                & (pitch <= sizes)
                & (height <= sizes // pitch.clamp(1) + 1)
            ).all()
        )
        and within("offset", (height - 1) * pitch + width, sizes)
        and within("row_slot", height, slots, or_none=True)
        and within("col_slot", width, slots, or_none=True)
        and within("whole_slot", 1, slots, or_none=True)
        and within("hyper", 1, rows)
        and bool(((has_rows == has_cols) & ((column["whole_slot"] >= 0) | ~has_rows)).all())
    )
    if not fits:
        raise ValueError("merit_ds: a row of tiles names elements, slots or scalars that are not there")


def _check_order(tiles: Tensor) -> None:
    """Raise ValueError where tiles of one matrix are apart: the CPU kernel finishes a matrix before it takes the next.

    So it would change a weight by the maxima of the tiles that it has met.
    """
    seen = set()
    for (slot, _), _ in groupby((Tile(*row) for row in tiles.tolist()), key=attrgetter("whole_slot", "tensor")):
        if slot >= 0 and slot in seen:
            raise ValueError(
                f"merit_ds::step: the tiles of whole_slot {slot} are apart or in several tensors: put those of one "
                "matrix side by side in the table, or call accumulate and then apply, which take any order"
            )
        seen.add(slot)


OPERATIONS = {name: _define(name) for name in _PURPOSE}
"""By name, as registered."""
