# SPDX-License-Identifier: Apache-2.0
"""MERIT on one whole tensor (arXiv 2508.20577, algorithm 1 and section 4): start reading here.

Nothing in here knows of shards, chunks or devices, and the optimizer does not call it: it is the oracle
that the tests hold the optimizer against, bit for bit.

Every operation is rounded to float32 once, so that no fused multiply-add can hide in it. Scalars are Python doubles
that torch rounds once to float32. The root goes through double: on a CPU `torch.sqrt` may be MKL's, which is one unit
off in 0.7 % of float32 values (measured with torch 2.13), while a rounded double root is the IEEE one.
"""

import torch
from torch import Tensor


def merit_step(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-6,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    eps_inside_sqrt: bool = False,
) -> None:
    """One step, in place.

    Args:
        weight: [R, C] (a matrix: row, column and whole ratios) or [N] (a vector: the whole ratio alone),
            float32; modified in place.
        grad: the averaged, clipped gradient; the weight's shape, float32.
        exp_avg: first moment m, float32; modified in place.
        exp_avg_sq: second moment v, float32; modified in place.
        eps_inside_sqrt: sqrt(v + eps) as the paper prints it; the default, sqrt(v) + eps, is the published
            code's, which made the paper's results.
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_((grad * grad) * (1 - beta2))
    radicand = exp_avg_sq + eps if eps_inside_sqrt else exp_avg_sq
    root = radicand.double().sqrt().float()
    root = root if eps_inside_sqrt else root + eps
    update = exp_avg / root + weight * weight_decay
    update = update * trust_ratio(weight, update)
    if clip is not None:
        update = update.clamp(-clip, clip)
    weight.sub_(update * lr)


def trust_ratio(weight: Tensor, update: Tensor) -> Tensor:
    """s: [R, C] for a matrix, a scalar for a vector; 1 wherever a maximum that the element needs is zero."""
    abs_weight, abs_update = weight.abs(), update.abs()
    whole = abs_weight.max() / abs_update.max()
    if weight.dim() < 2:
        undefined = (abs_weight.max() == 0) | (abs_update.max() == 0)
        return torch.where(undefined, 1.0, whole)
    row_weight, row_update = abs_weight.amax(1, keepdim=True), abs_update.amax(1, keepdim=True)
    col_weight, col_update = abs_weight.amax(0, keepdim=True), abs_update.amax(0, keepdim=True)
    largest = torch.maximum(torch.maximum(row_weight / row_update, col_weight / col_update), whole)
    undefined = (row_weight == 0) | (row_update == 0) | (col_weight == 0) | (col_update == 0)
    return torch.where(undefined, 1.0, largest)
