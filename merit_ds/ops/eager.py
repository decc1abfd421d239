# SPDX-License-Identifier: Apache-2.0
"""The two operations in plain torch, on any device that has float64.

Every operation is rounded to float32 once. `add(alpha=)`, `addcmul` and `addcdiv` may fuse a multiply-add, and would
then round differently on another device or in a vector's tail. `torch.sqrt` of float32 may be MKL's on a CPU, which is
one unit off in 0.7 % of values (measured with torch 2.13), so roots go through double.

Work goes tile by tile, so that scratch memory stays bounded whatever the size of a weight; `apply` computes the update
again instead of keeping it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merit_ds.layout import Fragment, Rectangle

# Elements of a tile. On a CPU the tile's few float32 temporaries should stay in a core's L2 cache;
# on an accelerator a tile must be large enough to hide the launches.
_TILE_CPU = 1 << 16
_TILE_ACCELERATOR = 1 << 22


@dataclass(frozen=True)
class Hyper:
    """A step's scalars, as Python doubles that are rounded once to float32 where they are used."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float | None
    eps_inside_sqrt: bool


@dataclass(frozen=True)
class Maxima:
    """Maxima of |w| (index 0) and |u| (index 1) that a fragment needs, float32.

    rows: [2, fragment.rows]; cols: [2, matrix.cols]; both empty for a vector. whole: [2].
    """

    rows: Tensor
    cols: Tensor
    whole: Tensor


def accumulate(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    maxima: Maxima,
    *,
    fragment: Fragment,
    hyper: Hyper,
) -> None:
    """First pass: moments in place, and the fragment's maxima raised into `maxima`.

    Args:
        weight, grad: a rank's flat slice [n], float32, bfloat16 or float16.
        exp_avg, exp_avg_sq: the moments' flat slice [n], float32; modified in place.
        maxima: holds what other fragments of the same matrix found so far, or zeros; modified in place.
    """
    for tile in _tiles(fragment, weight.device):
        w, g, m, v = (_view(tensor, tile) for tensor in (weight, grad, exp_avg, exp_avg_sq))
        g = g.float()
        m.mul_(hyper.beta1).add_(g * (1 - hyper.beta1))
        v.mul_(hyper.beta2).add_((g * g).mul_(1 - hyper.beta2))
        if not fragment.matrix.scaled:
            continue
        w = w.float()
        magnitudes = torch.stack((w, _update(w, m, v, hyper))).abs_()
        if fragment.matrix.is_vector:
            _raise(maxima.whole, magnitudes.amax((1, 2)))
            continue
        rows = magnitudes.amax(2)
        _raise(maxima.rows[:, tile.row : tile.row + tile.rows], rows)
        _raise(maxima.cols[:, tile.col : tile.col + tile.cols], magnitudes.amax(1))
        _raise(maxima.whole, rows.amax(1))


def apply(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, maxima: Maxima, *, fragment: Fragment, hyper: Hyper
) -> None:
    """Second pass: w -= lr * clip(s * u), with the matrix's complete maxima.

    Args:
        weight: a rank's flat slice [n]; modified in place, rounded to its dtype once.
        exp_avg, exp_avg_sq: as `accumulate` left them.
    """
    for tile in _tiles(fragment, weight.device):
        w, m, v = (_view(tensor, tile) for tensor in (weight, exp_avg, exp_avg_sq))
        w32 = w.float()
        update = _update(w32, m, v, hyper)
        if fragment.matrix.scaled:
            update.mul_(_whole_ratio(maxima) if fragment.matrix.is_vector else _element_ratio(maxima, tile))
        if hyper.clip is not None:
            update.clamp_(-hyper.clip, hyper.clip)
        w.copy_(w32 - update.mul_(hyper.lr))


def _update(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> Tensor:
    """u = m / (sqrt(v) + eps) + weight_decay * w, a new tensor."""
    root = _sqrt(exp_avg_sq + hyper.eps) if hyper.eps_inside_sqrt else _sqrt(exp_avg_sq).add_(hyper.eps)
    return torch.div(exp_avg, root, out=root).add_(weight * hyper.weight_decay)


def _sqrt(values: Tensor) -> Tensor:
    return values.double().sqrt_().float()


def _whole_ratio(maxima: Maxima) -> Tensor:
    """A vector's s, a scalar: 1 where max|w| or max|u| is zero."""
    return torch.where((maxima.whole == 0).any(), 1.0, maxima.whole[0] / maxima.whole[1])


def _element_ratio(maxima: Maxima, tile: Rectangle) -> Tensor:
    """A matrix tile's s [rows, cols]; the zero rule comes last, over NaN and over the whole-weight ratio."""
    rows = maxima.rows[:, tile.row : tile.row + tile.rows].unsqueeze(2)
    cols = maxima.cols[:, tile.col : tile.col + tile.cols].unsqueeze(1)
    ratio = torch.maximum(rows[0] / rows[1], cols[0] / cols[1])
    torch.maximum(ratio, maxima.whole[0] / maxima.whole[1], out=ratio)
    return ratio.masked_fill_((rows == 0).any(0), 1.0).masked_fill_((cols == 0).any(0), 1.0)


def _raise(target: Tensor, values: Tensor) -> None:
    torch.maximum(target, values, out=target)  # unlike fmax it keeps NaN


def _view(tensor: Tensor, tile: Rectangle) -> Tensor:
    return tensor[tile.offset : tile.offset + tile.rows * tile.cols].view(tile.rows, tile.cols)


def _tiles(fragment: Fragment, device: torch.device) -> Iterator[Rectangle]:
    """The fragment's rectangles in pieces of bounded size, each contiguous in memory: whole rows, or part of one."""
    limit = _TILE_CPU if device.type == "cpu" else _TILE_ACCELERATOR
    for piece in fragment.rectangles():
        if piece.cols > limit:
            step_rows, step_cols = 1, limit
        else:
            step_rows, step_cols = limit // piece.cols, piece.cols
        for row in range(0, piece.rows, step_rows):
            for col in range(0, piece.cols, step_cols):
                yield Rectangle(
                    offset=piece.offset + row * piece.cols + col,
                    row=piece.row + row,
                    col=piece.col + col,
                    rows=min(step_rows, piece.rows - row),
                    cols=min(step_cols, piece.cols - col),
                )
