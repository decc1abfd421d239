# SPDX-License-Identifier: Apache-2.0
"""What Merit accepts: settings, parameters, and saved states."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from merit_ds.fsdp import same_sharding
from merit_ds.ops.table import DTYPES
from merit_ds.shard import MATRIX_VIEWS, is_matrix_view, logical_matrices

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state's tensors, under the names that DeepSpeed's universal checkpoints know."""


def check_settings(group: dict[str, Any]) -> None:
    """Raise ValueError for a group's setting out of its range; names it, the value and what is allowed."""

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
    for name in ("no_weight_decay", "no_trust_ratio"):
        require(name, isinstance(group.get(name, False), bool), "True or False")
    if group.get("matrix_view") is not None:
        require("matrix_view", is_matrix_view(group["matrix_view"]), MATRIX_VIEWS)


def check_saved_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError where a saved group is not one of Merit's."""
    missing = sorted(defaults.keys() - group.keys())
    if missing:
        raise ValueError(f"this is not Merit's optimizer state: its groups have no {missing[0]}")
    check_settings(group)


def check_parameters(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter whose dtype or shape has no defined step."""
    for parameter in group["params"]:
        if parameter.dtype not in DTYPES:
            raise ValueError(f"Merit: a parameter is {parameter.dtype}, but it must be float32, bfloat16 or float16")
        logical_matrices(parameter, group)


def check_state(tensor: Tensor, state: dict[str, Any]) -> None:
    """Raise ValueError where a saved state does not belong to the tensor."""
    for name in MOMENTS:
        if name not in state:
            raise ValueError(f"this is not Merit's optimizer state: it has {sorted(state)} and no {name}")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} and its parameter {tuple(tensor.shape)}: the state "
                "belongs to another model or another number of ranks"
            )
        if not same_sharding(tensor, state[name]):
            raise ValueError(
                f"{name} is not sharded as its parameter is: load the state by set_optimizer_state_dict of "
                "torch.distributed.checkpoint.state_dict"
            )
