# SPDX-License-Identifier: Apache-2.0
"""Merit, the optimizer: parameter groups, state, and the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Real
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from merit_ds.binding import bind
from merit_ds.errors import UnsupportedError
from merit_ds.ops import Hyper
from merit_ds.registration import allow_under_zero
from merit_ds.shard import MATRIX_VIEWS, Shard, logical_matrices
from merit_ds.step import Task, take_step
from merit_ds.summary import log_summary

_MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Origin:
    """A group as it was given: wrappers later replace the tensors in the dict, a schedule the learning rate."""

    group: dict[str, Any]
    parameters: list[Tensor]
    shapes: list[torch.Size]
    lr: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> "_Origin":
        parameters = list(group["params"])
        return cls(group, parameters, [parameter.shape for parameter in parameters], float(group["lr"]))


class Merit(torch.optim.Optimizer):
    """MERIT: max-norm trust ratios by row, column and whole weight, the largest for every element, clipped.

    With the moments m and v of AdamW, without bias correction:

        u = m / (sqrt(v) + eps) + weight_decay * w
        s_ij = max(max|w_i,:| / max|u_i,:|,  max|w_:,j| / max|u_:,j|,  max|w| / max|u|)     (a vector: the last alone)
        w = w - lr * clip(s * u, -clip, clip)

    A maximum of zero makes s = 1. Weights of 2 dimensions are matrices; those of more say what they are by a
    `matrix_view` (see `merit_ds.shard.logical_matrices`). Source: arXiv 2508.20577, algorithm 1; `eps` outside the
    root as in its authors' published code. `merit_ds.reference` is the same in a few lines.

    Under DeepSpeed ZeRO-1 and 2 the result is bitwise that of the unsharded step for the same gradients.
    Arithmetic and state (`exp_avg`, `exp_avg_sq`, an int `step`) are float32 whatever the parameter's dtype.

    Args:
        params: parameters or groups, float32, bfloat16 or float16, contiguous. Groups may override every setting.
        lr: learning rate, the largest change of a weight in a step when `clip` is 1.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to sqrt(v).
        weight_decay: decoupled decay, inside u and therefore inside the ratio and the clip.
        clip: bound of |s * u|; None for no bound.
        decay_vectors: False leaves parameters of 0 or 1 dimensions undecayed whatever their group's `weight_decay`
            says; True obeys the group.
        eps_inside_sqrt: sqrt(v + eps), as the paper prints it.

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
    ) -> None:
        self._origins: list[_Origin] = []
        self._bound: dict[Tensor, Shard] = {}
        self._refusal: str | None = None
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "decay_vectors": decay_vectors,
            "eps_inside_sqrt": eps_inside_sqrt,
            "step": 0,  # DeepSpeed's elastic checkpoints look for it in the group
        }
        _check_settings(defaults)
        super().__init__(params, defaults)
        allow_under_zero(type(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings and shapes are checked now rather than in the first step."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            _check_settings(added)
            _check_parameters(added)
        except ValueError:
            self.param_groups.pop()
            raise
        self._origins.append(_Origin.of(added))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every weight that has a gradient.

        Under ZeRO all ranks of the data-parallel group must call it: it holds one all-reduce MAX.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            UnsupportedError: in the first step, when the wrapper around the optimizer is not one under which the
                result is exact. No weight has been changed then; the moments of cut weights may have been, so every
                further step is refused as well, until a state is loaded.
        """
        if self._refusal is not None:  # the moments have been touched: another try would not be exact
            raise UnsupportedError(self._refusal)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        newly_bound = [shard for group in self.param_groups for shard in self._bind(group)]
        shards = [self._bound[tensor] for group in self.param_groups for tensor in group["params"]]
        if newly_bound and self._is_deepspeed_dry_run(shards):
            for shard in shards:
                self._moments(shard.tensor)
            return loss
        tasks = [task for group in self.param_groups for task in self._tasks(group)]
        try:
            take_step(tasks, check_agreement=bool(newly_bound))
        except UnsupportedError as refusal:
            self._refusal = str(refusal)
            raise
        for group in self.param_groups:
            self._count(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, the moments as float32 (torch would cast them to the parameter's dtype).

        Raises:
            ValueError: the state is not Merit's, has settings out of range, or belongs to parameters of other shapes;
                nothing has been changed.
        """
        identifiers = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        pairs = [
            (tensor, state_dict["state"][identifier])
            for identifier, tensor in zip(identifiers, tensors, strict=False)
            if state_dict["state"].get(identifier)
        ]
        for group in state_dict["param_groups"]:
            _check_saved_group(group, self.defaults)
        for tensor, state in pairs:
            _check_state(tensor, state)
        origins = [self._origin(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        self._origins = [replace(origin, group=group) for origin, group in zip(origins, self.param_groups, strict=True)]
        self._bound.clear()
        self._refusal = None
        for tensor, state in pairs:
            for name in _MOMENTS:
                self.state[tensor][name] = state[name].to(tensor.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps the groups only, and a copy under ZeRO would take a flat partition for a vector.
        return {**super().__getstate__(), "_origins": self._origins, "_bound": {}, "_refusal": self._refusal}

    def _origin(self, group: dict[str, Any]) -> _Origin:
        for origin in self._origins:
            if origin.group is group:
                return origin
        raise UnsupportedError("Merit's param_groups were replaced: change the groups in place, or use add_param_group")

    def _bind(self, group: dict[str, Any]) -> list[Shard]:
        """The group's shards that were not bound before."""
        if all(tensor in self._bound for tensor in group["params"]):
            return []
        origin = self._origin(group)
        shards = bind(group, origin.parameters, shapes=origin.shapes)
        self._bound.update({shard.tensor: shard for shard in shards})
        if all(tensor in self._bound for origin in self._origins for tensor in origin.group["params"]):
            log_summary(
                [
                    (origin.group | {"lr": origin.lr}, [self._bound[tensor] for tensor in origin.group["params"]])
                    for origin in self._origins
                ]
            )
        return shards

    def _is_deepspeed_dry_run(self, shards: list[Shard]) -> bool:
        """FP16_UnfusedOptimizer's constructor calls `step` on zero gradients to create state.

        For Adam that is nearly harmless; Merit's ratio turns the bare decay term into a full step.
        """
        return all(
            shard.wrapper == "FP16_UnfusedOptimizer"
            and shard.tensor not in self.state
            and shard.tensor.grad is not None
            and not shard.tensor.grad.any()
            for shard in shards
        )

    def _tasks(self, group: dict[str, Any]) -> list[Task]:
        hyper, vector_hyper = _hyper(group, decays=True), _hyper(group, decays=group["decay_vectors"])
        tasks = []
        for tensor in group["params"]:
            shard = self._bound[tensor]
            if tensor.grad is None:
                if shard.group is not None:  # DeepSpeed gives every partition one, so this happens on all ranks or none
                    raise UnsupportedError("a partition of zero_optimization has no gradient: call step by the engine")
                continue
            if tensor.grad.is_sparse:
                raise UnsupportedError("Merit does not support sparse gradients: use dense ones (sparse=False)")
            grad = tensor.grad.contiguous().view(-1)
            tasks.append(Task(shard, grad, *self._moments(tensor), hyper=hyper, vector_hyper=vector_hyper))
        return tasks

    def _moments(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[tensor]
        if not state:
            state["step"] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
        return cast(Tensor, state["exp_avg"]), cast(Tensor, state["exp_avg_sq"])

    def _count(self, group: dict[str, Any]) -> None:
        stepped = [tensor for tensor in group["params"] if tensor.grad is not None]
        for tensor in stepped:
            self.state[tensor]["step"] += 1
        group["step"] += bool(stepped)


def _hyper(group: dict[str, Any], *, decays: bool) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]) if decays else 0.0,
        clip=None if group["clip"] is None else float(group["clip"]),
        eps_inside_sqrt=group["eps_inside_sqrt"],
    )


def _check_settings(group: dict[str, Any]) -> None:
    def require(name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise ValueError(f"Merit: {name}={group[name]!r}, but it must be {allowed}")

    def number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

    lr = group["lr"].item() if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1 else group["lr"]
    require("lr", number(lr) and lr >= 0, "a finite number, 0 or more")
    for name in ("eps", "weight_decay"):
        require(name, number(group[name]) and group[name] >= 0, "a finite number, 0 or more")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    require("betas", pair and all(number(beta) and 0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    clip = group["clip"]
    require("clip", clip is None or (number(clip) and clip > 0), "a finite number above 0, or None for no clipping")
    for name in ("decay_vectors", "eps_inside_sqrt"):
        require(name, isinstance(group[name], bool), "True or False")
    if group.get("matrix_view") is not None:
        require("matrix_view", group["matrix_view"] in MATRIX_VIEWS, f"one of {', '.join(MATRIX_VIEWS)}")


def _check_saved_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    missing = sorted(defaults.keys() - group.keys())
    if missing:
        raise ValueError(f"this is not Merit's optimizer state: its groups have no {missing[0]}")
    _check_settings(group)


def _check_parameters(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"Merit: a parameter is {parameter.dtype}, but it must be float32, bfloat16 or float16")
        logical_matrices(parameter, group)


def _check_state(tensor: Tensor, state: dict[str, Any]) -> None:
    for name in _MOMENTS:
        if name not in state:
            raise ValueError(f"this is not Merit's optimizer state: it has {sorted(state)} and no {name}")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} and its parameter {tuple(tensor.shape)}: the state "
                "belongs to another model or another number of ranks"
            )
