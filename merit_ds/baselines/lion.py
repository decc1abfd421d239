# SPDX-License-Identifier: Apache-2.0
"""Lion (arXiv 2302.06675): the sign of an interpolated momentum."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.ops.rule import Moments, Norms, Rule
from merit_ds.ops.table import by_kind, host_lr
from merit_ds.sharded import ShardedOptimizer


class LionScalars(NamedTuple):
    """A step's scalars."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    weight_decay: Any
    lr: Any


@dataclass(frozen=True)
class LionRule(Rule):
    """w -= lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w);  m = beta2 * m + (1 - beta2) * g"""

    hyper = LionScalars
    moments = ("exp_avg",)

    def scalars(self, settings: dict[str, Any]) -> list[LionScalars]:
        beta1, beta2 = settings["betas"]
        scalars = LionScalars(beta1, 1.0 - beta1, beta2, 1.0 - beta2, settings["weight_decay"], host_lr(settings))
        return by_kind(scalars, settings)

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LionScalars, norms: Norms | None) -> Tensor:
        (m,) = moments
        update = self.update(weight, grad, moments, hyper)
        m.mul_(hyper.beta2).add_(grad * hyper.one_minus_beta2)
        return weight - update.mul_(hyper.lr)

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LionScalars) -> Tensor:
        (m,) = moments
        blend: Tensor = m * hyper.beta1
        return blend.add_(grad * hyper.one_minus_beta1).sign_().add_(weight * hyper.weight_decay)


class MeritLion(ShardedOptimizer):
    """Lion (arXiv 2302.06675, program 1), element-wise and so bitwise exact under every sharding.

    There are no trust ratios: `no_trust_ratio` on a parameter changes nothing, and in a group it is refused.

    Args:
        params: as of `merit_ds.Merit`.
        lr: learning rate, the change of a weight in a step; a tenth of AdamW's or less.
        betas: of the interpolation, and of the momentum `exp_avg`. MERIT's paper compares with (0.95, 0.98).
        weight_decay: decoupled.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed, whatever their group says.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.1,
        *,
        decay_vectors: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decay_vectors": decay_vectors}
        super().__init__(params, defaults, rule=LionRule())
