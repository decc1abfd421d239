# SPDX-License-Identifier: Apache-2.0
"""Sophia-G (arXiv 2305.14342): momentum over an estimate of the Gauss-Newton diagonal, clipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.binding import stepped_tensors
from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import local_part
from merit_ds.ops.rule import Moments, Norms, Rule
from merit_ds.ops.table import by_kind, host_lr
from merit_ds.shard import own_parts
from merit_ds.sharded import ShardedOptimizer
from merit_ds.work import Work
from merit_ds.zero3 import is_partitioned


class SophiaScalars(NamedTuple):
    """A step's scalars."""

    beta1: Any
    one_minus_beta1: Any
    gamma: Any
    eps: Any
    weight_decay: Any
    lr: Any


@dataclass(frozen=True)
class SophiaRule(Rule):
    """m = beta1 * m + (1 - beta1) * g;  w -= lr * (clip(m / max(gamma * h, eps), -1, 1) + weight_decay * w)"""

    hyper = SophiaScalars
    moments = ("exp_avg", "exp_avg_sq")

    def scalars(self, settings: dict[str, Any]) -> list[SophiaScalars]:
        beta1 = settings["betas"][0]
        scalars = SophiaScalars(
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            gamma=settings["gamma"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            lr=host_lr(settings),
        )
        return by_kind(scalars, settings)

    def accumulate(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: SophiaScalars, *, measured: bool
    ) -> None:
        moments[0].mul_(hyper.beta1).add_(grad * hyper.one_minus_beta1)

    def apply(
        self, weight: Tensor, grad: Tensor, moments: Moments, hyper: SophiaScalars, norms: Norms | None
    ) -> Tensor:
        return weight - self.update(weight, grad, moments, hyper).mul_(hyper.lr)

    def update(self, weight: Tensor, grad: Tensor, moments: Moments, hyper: SophiaScalars) -> Tensor:
        m, h = moments
        return (m / torch.maximum(h * hyper.gamma, hyper.eps)).clamp_(-1, 1).add_(weight * hyper.weight_decay)


class MeritSophiaG(ShardedOptimizer):
    """Sophia-G (arXiv 2305.14342, algorithm 3), with the Gauss-Newton-Bartlett estimate of the Hessian's diagonal.

    The state `exp_avg_sq` holds h, the moving average of the estimates: each is an average of squared gradients, of a
    loss whose labels were drawn from the model itself. Who trains calls `update_hessian` with that gradient every
    `hessian_interval` steps, before the first step too; this package's trainer does so. Steps are element-wise, so
    bitwise exact under ZeRO-1 and 2, tensor parallelism and fully_shard. ZeRO-3 is refused by `update_hessian`. There
    are no trust ratios: `no_trust_ratio` on a parameter changes nothing, and in a group it is refused.

    Args:
        params: as of `merit_ds.Merit`.
        lr: learning rate, the largest change of a weight in a step.
        betas: of the momentum, and of h. MERIT's paper compares with (0.92, 0.99).
        eps: least denominator.
        weight_decay: decoupled.
        gamma: share of h in the denominator; the smaller, the more elements are clipped.
        hessian_interval: steps between two estimates; for whoever calls `update_hessian`.
        hessian_sequences: sequences of one estimate; likewise. MERIT's paper has 240 every 10 steps.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed, whatever their group says.

    Raises:
        ValueError: a setting out of its range, a group's own interval or sequences, or a parameter whose dtype or
            shape has no defined step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.92, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        gamma: float = 0.05,
        hessian_interval: int = 10,
        hessian_sequences: int = 240,
        decay_vectors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "hessian_interval": hessian_interval,
            "hessian_sequences": hessian_sequences,
            "decay_vectors": decay_vectors,
        }
        super().__init__(params, defaults, rule=SophiaRule())
        self._estimated = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; an estimate is one of all weights, so a group has no interval or sequences of its own."""
        for key in ("hessian_interval", "hessian_sequences"):
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"MeritSophiaG: {key} is one for all groups: give it to the optimizer, not to a group")
        super().add_param_group(param_group)

    @torch.no_grad()
    def update_hessian(self, grads: Sequence[Tensor], *, examples: int) -> None:
        """h = beta2 * h + (1 - beta2) * examples * g * g; no collective, and no weight changes.

        Args:
            grads: of the mean loss over labels drawn from the model's own predictions, averaged over data-parallel
                ranks: a whole tensor (under tensor parallelism this rank's part) for each trainable parameter that the
                optimizer was constructed with, group by group.
            examples: over how many predictions that mean goes: tokens, for a language model.

        Raises:
            UnsupportedError: the parameters are sharded by ZeRO-3.
            ValueError: as many gradients of these shapes are not wanted.
        """
        trained = [p for origin in self._origins for p in origin.parameters if p.requires_grad]
        if is_partitioned(trained):
            raise UnsupportedError("MeritSophiaG does not support zero_optimization.stage 3: use 1 or 2")
        if [grad.shape for grad in grads] != [parameter.shape for parameter in trained]:
            raise ValueError(
                f"MeritSophiaG: {len(grads)} gradients do not fit the {len(trained)} trainable parameters one by one"
            )
        values = {id(parameter): grad for parameter, grad in zip(trained, grads, strict=True)}
        for origin in self._origins:
            self._bind(origin.group)
            beta2 = origin.group["betas"][1]
            for tensor in stepped_tensors(origin.group, origin.parameters):
                if self._bound[tensor].idle:
                    continue
                h = local_part(self._moments(tensor)["exp_avg_sq"]).view(-1)
                for place, grad in own_parts(self._bound[tensor], values):
                    grad = grad.to(h.device, torch.float32)
                    h[place].mul_(beta2).add_((grad * grad).mul_((1.0 - beta2) * examples))
        self._estimated = True

    def _check_ready(self, work: Work) -> None:
        if self._estimated or any(group["step"] for group in self.param_groups):
            return
        # A step of zero gradients, by which torch makes an optimizer create its state, changes nothing without one.
        # Of a gradient that is not, a rank may hold zeros or nothing, and would wait for those that refuse the step.
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        lacking = any(grad is not None and bool(local_part(grad).any()) for grad in grads)
        work.agree(
            "MeritSophiaG has no estimate of the Hessian yet: call update_hessian before the first step and every "
            "hessian_interval steps, as pretrain_gpt.py does"
            if lacking
            else None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_estimated": self._estimated}
