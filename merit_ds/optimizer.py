# SPDX-License-Identifier: Apache-2.0
"""Merit, and the form of it that has the whole-weight ratio alone."""

from typing import Any, Literal

from torch.optim.optimizer import ParamsT

from merit_ds.ops.merit_rule import MERIT, MeritRule
from merit_ds.ops.rule import L2
from merit_ds.sharded import ShardedOptimizer

_RULES = {"max": MERIT, "l2": MeritRule(L2)}


class Merit(ShardedOptimizer):
    """MERIT: max-norm trust ratios by row, column and whole weight, the largest for every element, clipped.

    With the moments m and v of AdamW, without bias correction:

        u = m / (sqrt(v) + eps) + weight_decay * w
        s_ij = max(max|w_i,:| / max|u_i,:|,  max|w_:,j| / max|u_:,j|,  max|w| / max|u|)     (a vector: the last alone)
        w = w - lr * clip(s * u, -clip, clip)

    A maximum of zero makes s = 1. Weights of 2 dimensions are matrices; those of more say what they are by a
    `matrix_view` (see `merit_ds.shard.logical_matrices`). Source: arXiv 2508.20577, algorithm 1; `eps` outside the
    root as in its authors' published code. `merit_ds.reference` is the same in a few lines.

    Under DeepSpeed ZeRO-1, 2 and 3 and PyTorch's fully_shard (construct Merit after it) the result is bitwise that of
    the unsharded step for the same gradients; with `norm="l2"`, whose sums are rounded, to one unit of the ratio.
    Arithmetic and state (`exp_avg`, `exp_avg_sq`, an int `step`) are float32 whatever the parameter's dtype.

    Args:
        params: parameters or groups, float32, bfloat16 or float16, contiguous. Groups may override every setting but
            `norm` and `fused`.
        lr: learning rate, the largest change of a weight in a step when `clip` is 1.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to sqrt(v).
        weight_decay: decoupled decay, inside u and therefore inside the ratio and the clip.
        clip: bound of |s * u|; None for no bound.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed whatever their group's `weight_decay`
            says; True obeys the group.
        eps_inside_sqrt: sqrt(v + eps), as the paper prints it.
        elementwise: False leaves the whole-weight ratio alone (an ablation of the paper's figure 9, and `MeritW`).
        whole_bound: False leaves the whole-weight ratio out where there are rows and columns (an ablation).
        norm: "l2" for l2 norms of rows, columns and whole in place of maxima (an ablation; it has no fused kernel).
        fused: True for the compiled kernels or an error; False for plain torch operations; None for the kernels where
            they can be built, else plain torch with one warning. All give the same bits. Read in the first step.

    Attributes: `found_inf` and `inspect`, as of `merit_ds.sharded.ShardedOptimizer`.

    Raises:
        ValueError: a setting out of its range, or a parameter whose dtype or shape has no defined step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        *,
        clip: float | None = 1.0,
        decay_vectors: bool = False,
        eps_inside_sqrt: bool = False,
        elementwise: bool = True,
        whole_bound: bool = True,
        norm: Literal["max", "l2"] = "max",
        fused: bool | None = None,
    ) -> None:
        if norm not in _RULES:
            raise ValueError(f"{type(self).__name__}: norm={norm!r}, but it must be 'max' or 'l2'")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "decay_vectors": decay_vectors,
            "eps_inside_sqrt": eps_inside_sqrt,
            "elementwise": elementwise,
            "whole_bound": whole_bound,
        }
        super().__init__(params, defaults, rule=_RULES[norm], fused=fused)


class MeritW(Merit):
    """MERIT-W: `Merit` with the whole-weight ratio alone, the form of the paper's convergence theorem.

    s = max|w| / max|u| for every element of a weight, and the update is clipped. Its arguments are those of `Merit`,
    but for the ratios that it does not have.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        *,
        clip: float | None = 1.0,
        decay_vectors: bool = False,
        eps_inside_sqrt: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            clip=clip,
            decay_vectors=decay_vectors,
            eps_inside_sqrt=eps_inside_sqrt,
            elementwise=False,
            fused=fused,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `Merit`. Raises: ValueError: also for a group with `elementwise`, which would make it Merit."""
        _refuse_elementwise(param_group)
        super().add_param_group(param_group)

    def _check_saved_group(self, group: dict[str, Any]) -> None:
        _refuse_elementwise({"elementwise": True} | group)  # an earlier version's may lack it, and was Merit's
        super()._check_saved_group(group)


def _refuse_elementwise(group: dict[str, Any]) -> None:
    if group.get("elementwise", False):
        raise ValueError("MeritW: a group has elementwise=True, which is Merit: use Merit for it")
