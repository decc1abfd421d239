# SPDX-License-Identifier: Apache-2.0
"""LAMB (arXiv 1904.00962, algorithm 2), and with max norms the maxLAMB of MERIT's paper (arXiv 2508.20577, table 3)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.ops.merit_rule import advance
from merit_ds.ops.rule import L2, MAX, Moments, Norm, Norms, Rule
from merit_ds.ops.table import by_kind, host_lr
from merit_ds.sharded import ShardedOptimizer


class LambScalars(NamedTuple):
    """A step's scalars. The corrections are 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), or 1 without any."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    correction1: Any
    root_correction2: Any
    eps: Any
    weight_decay: Any
    lr: Any


@dataclass(frozen=True)
class LambRule(Rule):
    """u = m^ / (sqrt(v^) + eps) + weight_decay * w;  w -= lr * |w| / |u| * u"""

    hyper = LambScalars
    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    norm: Norm = L2

    def scalars(self, settings: dict[str, Any]) -> list[LambScalars]:
        (beta1, beta2), step = settings["betas"], settings["step"] + 1
        corrected = settings["bias_correction"]
        scalars = LambScalars(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            correction1=1.0 / (1.0 - beta1**step) if corrected else 1.0,
            root_correction2=1.0 / math.sqrt(1.0 - beta2**step) if corrected else 1.0,
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            lr=host_lr(settings),
        )
        return by_kind(scalars, settings)

    def accumulate(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LambScalars, *, measured: bool
    ) -> Tensor | None:
        advance(moments, grad, hyper)
        return self.update(weight, grad, moments, hyper) if measured else None

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LambScalars, norms: Norms | None) -> Tensor:
        update = self.update(weight, grad, moments, hyper)
        if norms is not None:
            update.mul_(self.ratio(norms, hyper))
        return weight - update.mul_(hyper.lr)

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LambScalars) -> Tensor:
        m, v = moments
        root = v.double().sqrt_().float().mul_(hyper.root_correction2).add_(hyper.eps)
        return torch.div(m * hyper.correction1, root, out=root).add_(weight * hyper.weight_decay)


class MeritLAMB(ShardedOptimizer):
    """LAMB (arXiv 1904.00962): AdamW's update, scaled for each weight to the weight's l2 norm.

    The ratio is |w| / |u| with phi(z) = z, and 1 where either norm is zero. It is right under ZeRO-1, 2 and 3, tensor
    parallelism and `fully_shard`: squares are summed in float64, over ranks in their order, so that a sharded ratio
    differs from the unsharded one, if at all, by one unit in its last place.

    Args:
        params: as of `merit_ds.Merit`; a tensor of three or more dimensions says by its `matrix_view` what a weight is.
        lr, betas, eps, weight_decay: as of AdamW, weight_decay inside the ratio.
        bias_correction: m / (1 - beta1^t) and v / (1 - beta2^t), as in the paper's algorithm.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed, whatever their group says.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    _NORM: ClassVar[Norm] = L2

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        *,
        bias_correction: bool = True,
        decay_vectors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "decay_vectors": decay_vectors,
        }
        super().__init__(params, defaults, rule=LambRule(self._NORM))


class MeritMaxLAMB(MeritLAMB):
    """maxLAMB (arXiv 2508.20577, table 3): `MeritLAMB` with max norms, which makes it bitwise exact under sharding."""

    _NORM = MAX
