# SPDX-License-Identifier: Apache-2.0
"""The operations in plain torch for any rule, on any device that has float64: the reference of the fused kernels.

Work goes tile by tile, so that scratch memory stays bounded whatever the size of a weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from merit_ds.ops.rule import Norm, Norms, Rule
from merit_ds.ops.table import Operands, Tile

# Elements of a tile. On a CPU the tile's few float32 temporaries should stay in a core's L2 cache;
# on an accelerator a tile must be large enough to hide the launches.
_TILE_CPU = 1 << 16
_TILE_ACCELERATOR = 1 << 22


def accumulate(
    rule: Rule,
    operands: Operands,
    *,
    tiles: Tensor,
    scalars: Tensor,
    maxima: Tensor,
    noop: Tensor | None = None,
) -> None:
    """First pass: moments in place, and the tiles' magnitudes brought into `maxima`.

    Args:
        rule: the formula; it says what the scalars are.
        operands: the tensors; the moments are modified in place.
        tiles: [tiles, 9], int64, on the CPU; see `merit_ds.ops.table.Tile`.
        scalars: [rows, scalars of the rule], float32, on the tensors' device.
        maxima: [slots, 2], in the norm's dtype: of the weight, of what the rule measures beside it. Maxima, or sums of
            squares. Holds what others found so far, or zeros; modified in place.
        noop: one float; if it is not 0, nothing is touched.
    """
    if noop is not None and bool(noop):
        return
    rows = _hypers(rule, scalars)
    for tile in pieces(tiles, operands):
        w, g, *moments = (view(tensors[tile.tensor], tile) for tensors in operands if tensors)
        w = w.float()
        measured = rule.norm is not None and tile.whole_slot >= 0
        beside = rule.accumulate(w, g.float(), moments, rows[tile.hyper], measured=measured)
        if rule.norm is not None and beside is not None and measured:
            _measure(rule.norm, torch.stack((w, beside)), maxima, tile)


def apply(
    rule: Rule,
    operands: Operands,
    *,
    tiles: Tensor,
    scalars: Tensor,
    maxima: Tensor,
    noop: Tensor | None = None,
) -> None:
    """Second pass, with the matrices' complete norms.

    Args: as `accumulate` left them; the weights are modified in place, rounded to their dtype once.
    """
    if noop is not None and bool(noop):
        return
    rows = _hypers(rule, scalars)
    for tile in pieces(tiles, operands):
        w, g, *moments = (view(tensors[tile.tensor], tile) for tensors in operands if tensors)
        w.copy_(rule.apply(w.float(), g.float(), moments, rows[tile.hyper], norms_of(rule, maxima, tile)))


def step(
    rule: Rule,
    operands: Operands,
    *,
    tiles: Tensor,
    scalars: Tensor,
    maxima: Tensor,
    noop: Tensor | None = None,
) -> None:
    """Both passes, for fragments to whose norms nobody else contributes."""
    accumulate(rule, operands, tiles=tiles, scalars=scalars, maxima=maxima, noop=noop)
    apply(rule, operands, tiles=tiles, scalars=scalars, maxima=maxima, noop=noop)


def norms_of(rule: Rule, maxima: Tensor, tile: Tile) -> Norms | None:
    """A tile's complete norms; None where it has no trust ratio."""
    if rule.norm is None or tile.whole_slot < 0:
        return None
    finish = rule.norm.finish
    whole = finish(maxima[tile.whole_slot])
    if tile.row_slot < 0:
        return Norms(whole, None, None)
    rows = finish(maxima[tile.row_slot : tile.row_slot + tile.rows]).unsqueeze(1)
    cols = finish(maxima[tile.col_slot : tile.col_slot + tile.cols]).unsqueeze(0)
    return Norms(whole, rows, cols)


def view(tensor: Tensor | None, tile: Tile) -> Tensor:
    """A tile's elements [rows, cols] of a flat, contiguous tensor, sharing its memory."""
    assert tensor is not None, "pieces() leaves out tensors without a gradient"
    return tensor.as_strided((tile.rows, tile.cols), (tile.pitch, 1), tensor.storage_offset() + tile.offset)


def pieces(tiles: Tensor, operands: Operands) -> Iterator[Tile]:
    """The rectangles of tensors that have a gradient, in pieces of bounded size: whole rows, or parts of one."""
    for row in tiles.tolist():
        whole = Tile(*row)
        if operands.grads[whole.tensor] is None:
            continue
        limit = _TILE_CPU if operands.weights[whole.tensor].device.type == "cpu" else _TILE_ACCELERATOR
        step_cols = min(whole.cols, limit)
        step_rows = limit // step_cols
        for first in range(0, whole.rows, step_rows):
            for col in range(0, whole.cols, step_cols):
                yield whole.part(
                    first, col, rows=min(step_rows, whole.rows - first), cols=min(step_cols, whole.cols - col)
                )


def _hypers(rule: Rule, scalars: Tensor) -> list[Any]:
    return [rule.hyper(*row.unbind()) for row in scalars]


def _measure(norm: Norm, pair: Tensor, maxima: Tensor, tile: Tile) -> None:
    """Bring the magnitudes of a weight's piece and of what is beside it, [2, rows, cols], into their slots."""
    magnitudes = norm.magnitude(pair)
    if tile.row_slot >= 0:
        norm.merge(maxima[tile.row_slot : tile.row_slot + tile.rows], norm.reduce(magnitudes, (2,)).t())
        norm.merge(maxima[tile.col_slot : tile.col_slot + tile.cols], norm.reduce(magnitudes, (1,)).t())
    norm.merge(maxima[tile.whole_slot], norm.reduce(magnitudes, (1, 2)))
