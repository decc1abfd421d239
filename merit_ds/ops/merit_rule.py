# SPDX-License-Identifier: Apache-2.0
"""MERIT's formula (arXiv 2508.20577, algorithm 1) in plain torch: what the fused kernels are held to, bit for bit.

Every operation is rounded to float32 once. `add(alpha=)`, `addcmul` and `addcdiv` may fuse a multiply-add, and would
then round differently on another device or in a vector's tail. `torch.sqrt` of float32 may be MKL's on a CPU, which is
one unit off in 0.7 % of values (measured with torch 2.13), so roots go through double.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_ds.ops.rule import MAX, Moments, Norm, Norms, Rule
from merit_ds.ops.table import Scalars, scalars_of


def advance(moments: Moments, grad: Tensor, hyper: Any) -> None:
    """The first and the second moment of a gradient [rows, cols], in place: Adam's, MERIT's and LAMB's."""
    m, v = moments
    m.mul_(hyper.beta1).add_(grad * hyper.one_minus_beta1)
    v.mul_(hyper.beta2).add_((grad * grad).mul_(hyper.one_minus_beta2))


@dataclass(frozen=True)
class MeritRule(Rule):
    """w -= lr * clip(s * u), with the ratios of row, column and whole weight by some norm."""

    hyper = Scalars
    moments = ("exp_avg", "exp_avg_sq")
    elementwise = True

    norm: Norm = MAX

    def scalars(self, settings: dict[str, Any]) -> list[Scalars]:
        return scalars_of(settings)

    def accumulate(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Scalars, *, measured: bool
    ) -> Tensor | None:
        advance(moments, grad, hyper)
        return self.update(weight, grad, moments, hyper) if measured else None

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Scalars, norms: Norms | None) -> Tensor:
        update = self.update(weight, grad, moments, hyper)  # again, instead of keeping it
        if norms is not None:
            update.mul_(self.ratio(norms, hyper))
        torch.minimum(update, hyper.clip, out=update)  # clamp_ by tensors is eight times slower on a CPU
        torch.maximum(update, -hyper.clip, out=update)
        return weight - update.mul_(hyper.lr)

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: Scalars) -> Tensor:
        """u = m / (sqrt(v) + eps) + weight_decay * w, a new tensor. Adding the eps that is zero changes nothing."""
        m, v = moments
        root = (v + hyper.eps_inside).double().sqrt_().float().add_(hyper.eps_outside)
        return torch.div(m, root, out=root).add_(weight * hyper.weight_decay)


MERIT = MeritRule()
