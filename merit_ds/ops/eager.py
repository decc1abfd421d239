# SPDX-License-Identifier: Apache-2.0
"""The operations in plain torch, on any device that has float64: the reference of the fused kernels.

Every operation is rounded to float32 once. `add(alpha=)`, `addcmul` and `addcdiv` may fuse a multiply-add, and would
then round differently on another device or in a vector's tail. `torch.sqrt` of float32 may be MKL's on a CPU, which is
one unit off in 0.7 % of values (measured with torch 2.13), so roots go through double.

Work goes tile by tile, so that scratch memory stays bounded whatever the size of a weight; `apply` computes the update
again instead of keeping it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from merit_ds.ops.table import Operands, Scalars, Tile

# Elements of a tile. On a CPU the tile's few float32 temporaries should stay in a core's L2 cache;
# on an accelerator a tile must be large enough to hide the launches.
_TILE_CPU = 1 << 16
_TILE_ACCELERATOR = 1 << 22


def accumulate(
    operands: Operands, *, tiles: Tensor, scalars: Tensor, maxima: Tensor, noop: Tensor | None = None
) -> None:
    """First pass: moments in place, and the tiles' maxima raised into `maxima`.

    Args:
        operands: the tensors; the moments are modified in place.
        tiles: [tiles, 9], int64, on the CPU; see `merit_ds.ops.table.Tile`.
        scalars: [rows, 9], float32, on the tensors' device; see `merit_ds.ops.table.Scalars`.
        maxima: [slots, 2], float32: of |w|, of |u|. Holds what others found so far, or zeros; modified in place.
        noop: one float; if it is not 0, nothing is touched.
    """
    if noop is not None and bool(noop):
        return
    rows = [Scalars(*row.unbind()) for row in scalars]
    for tile in _tiles(tiles, operands):
        w, g, m, v = (_view(tensors[tile.tensor], tile) for tensors in operands)
        hyper = rows[tile.hyper]
        g = g.float()
        m.mul_(hyper.beta1).add_(g * hyper.one_minus_beta1)
        v.mul_(hyper.beta2).add_((g * g).mul_(hyper.one_minus_beta2))
        if tile.whole_slot < 0:
            continue
        w = w.float()
        magnitudes = torch.stack((w, _update(w, m, v, hyper))).abs_()
        if tile.row_slot >= 0:
            _raise(maxima[tile.row_slot : tile.row_slot + tile.rows], magnitudes.amax(2).t())
            _raise(maxima[tile.col_slot : tile.col_slot + tile.cols], magnitudes.amax(1).t())
        _raise(maxima[tile.whole_slot], magnitudes.amax((1, 2)))


def apply(operands: Operands, *, tiles: Tensor, scalars: Tensor, maxima: Tensor, noop: Tensor | None = None) -> None:
    """Second pass: w -= lr * clip(s * u), with the matrices' complete maxima.

    Args: as `accumulate` left them; the weights are modified in place, rounded to their dtype once.
    """
    if noop is not None and bool(noop):
        return
    rows = [Scalars(*row.unbind()) for row in scalars]
    for tile in _tiles(tiles, operands):
        w, _, m, v = (_view(tensors[tile.tensor], tile) for tensors in operands)
        hyper = rows[tile.hyper]
        w32 = w.float()
        update = _update(w32, m, v, hyper)
        if tile.whole_slot >= 0:
            update.mul_(_ratio(maxima, tile))
        torch.minimum(update, hyper.clip, out=update)  # clamp_ by tensors is eight times slower on a CPU
        torch.maximum(update, -hyper.clip, out=update)
        w.copy_(w32 - update.mul_(hyper.lr))


def step(operands: Operands, *, tiles: Tensor, scalars: Tensor, maxima: Tensor, noop: Tensor | None = None) -> None:
    """Both passes, for fragments to whose maxima nobody else contributes."""
    accumulate(operands, tiles=tiles, scalars=scalars, maxima=maxima, noop=noop)
    apply(operands, tiles=tiles, scalars=scalars, maxima=maxima, noop=noop)


def _update(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Scalars) -> Tensor:
    """u = m / (sqrt(v) + eps) + weight_decay * w, a new tensor. Adding the eps that is zero changes nothing."""
    root = (exp_avg_sq + hyper.eps_inside).double().sqrt_().float().add_(hyper.eps_outside)
    return torch.div(exp_avg, root, out=root).add_(weight * hyper.weight_decay)


def _ratio(maxima: Tensor, tile: Tile) -> Tensor:
    """s, [rows, cols] for a matrix; the zero rule comes last, over NaN and over the whole-weight ratio."""
    whole = maxima[tile.whole_slot]
    if tile.row_slot < 0:
        return torch.where((whole == 0).any(), 1.0, whole[0] / whole[1])
    rows = maxima[tile.row_slot : tile.row_slot + tile.rows].unsqueeze(1)
    cols = maxima[tile.col_slot : tile.col_slot + tile.cols].unsqueeze(0)
    ratio = torch.maximum(rows[..., 0] / rows[..., 1], cols[..., 0] / cols[..., 1])
    torch.maximum(ratio, whole[0] / whole[1], out=ratio)
    return ratio.masked_fill_((rows == 0).any(2), 1.0).masked_fill_((cols == 0).any(2), 1.0)


def _raise(target: Tensor, values: Tensor) -> None:
    torch.maximum(target, values, out=target)  # unlike fmax it keeps NaN


def _view(tensor: Tensor | None, tile: Tile) -> Tensor:
    assert tensor is not None, "_tiles leaves out tensors without a gradient"
    return tensor.as_strided((tile.rows, tile.cols), (tile.pitch, 1), tensor.storage_offset() + tile.offset)


def _tiles(tiles: Tensor, operands: Operands) -> Iterator[Tile]:
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
