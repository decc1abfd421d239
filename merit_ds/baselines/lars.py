# SPDX-License-Identifier: Apache-2.0
"""LARS (arXiv 1708.03888): momentum SGD with a rate for each weight."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.ops.rule import L2, Moments, Norms, Rule
from merit_ds.ops.table import by_kind, host_lr
from merit_ds.sharded import ShardedOptimizer


class LarsScalars(NamedTuple):
    """A step's scalars."""

    momentum: Any
    trust_coefficient: Any
    eps: Any
    weight_decay: Any
    lr: Any


@dataclass(frozen=True)
class LarsRule(Rule):
    """d = g + weight_decay * w;  local = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)

    m = momentum * m + lr * local * d;  w -= m
    """

    hyper = LarsScalars
    moments = ("exp_avg",)
    norm = L2

    def scalars(self, settings: dict[str, Any]) -> list[LarsScalars]:
        scalars = LarsScalars(*(settings[name] for name in LarsScalars._fields))
        return by_kind(scalars._replace(lr=host_lr(settings)), settings)

    def accumulate(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LarsScalars, *, measured: bool
    ) -> Tensor | None:
        return grad if measured else None

    def apply(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LarsScalars, norms: Norms | None) -> Tensor:
        (m,) = moments
        change = self.update(weight, grad, moments, hyper)
        if norms is not None:
            change.mul_(self.ratio(norms, hyper))
        m.mul_(hyper.momentum).add_(change.mul_(hyper.lr))
        return weight - m

    def ratio(self, norms: Norms, hyper: LarsScalars) -> Tensor:
        of_weight, of_grad = norms.whole
        local = hyper.trust_coefficient * of_weight / (of_grad + hyper.weight_decay * of_weight + hyper.eps)
        return torch.where((norms.whole == 0).any(), 1.0, local).float()

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: LarsScalars) -> Tensor:
        decay: Tensor = weight * hyper.weight_decay
        return decay.add_(grad)


class MeritLARS(ShardedOptimizer):
    """LARS (arXiv 1708.03888, algorithm 1): momentum SGD whose rate for each weight is in proportion to |w| / |g|.

    The momentum, which holds the rate of its step as in the paper, is the state `exp_avg`. Norms are summed as for
    `merit_ds.baselines.MeritLAMB`; where one is zero the local rate is 1.

    Args:
        params: as of `merit_ds.Merit`.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: added to the gradient, as l2 regularisation; its norm counts in the local rate.
        trust_coefficient: the paper's eta.
        eps: added to the denominator.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed, whatever their group says.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        decay_vectors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "decay_vectors": decay_vectors,
        }
        super().__init__(params, defaults, rule=LarsRule())
