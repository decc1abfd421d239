# SPDX-License-Identifier: Apache-2.0
"""Exceptions to MERIT's rules, set as attributes on a model's parameters before the optimizer is constructed.

An attribute reaches the optimizer by every way in, DeepSpeed's JSON too, where names are long lost.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch


def mark_parameters(
    model: torch.nn.Module,
    *,
    no_weight_decay: Sequence[str] = (),
    no_trust_ratio: Sequence[str] = (),
    sign_update: Sequence[str] = (),
) -> None:
    """Exempt parameters from weight decay, or from the trust ratio (s = 1), by patterns of their names.

    `MeritLion`, `MeritSophiaG` and `MeritScion` have no trust ratio and pass `no_trust_ratio` over; the decay of
    `MeritScion` is the shrinking of `constrained`. `sign_update` is for `MeritScion` alone: parameters that take the
    step of an embedding or an output layer.

    An optimizer reads the marks in its first step; later ones change nothing until it loads a state.

    Args:
        model: whose `named_parameters` are meant; a tied weight goes by each of its names.
        no_weight_decay, no_trust_ratio, sign_update: shell patterns, for instance "*.bias" or "embedding.*".

    Raises:
        ValueError: a pattern matches no parameter; nothing has been marked.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has several
    marks = {"no_weight_decay": no_weight_decay, "no_trust_ratio": no_trust_ratio, "sign_update": sign_update}
    for mark, patterns in marks.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                one = next(iter(named), None)
                raise ValueError(f"mark_parameters: no parameter matches {mark}={pattern!r}; one is {one!r}")
    for mark, patterns in marks.items():
        for name, parameter in named.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                setattr(parameter, mark, True)


def split_qkv(model: torch.nn.Module) -> list[str]:
    """Have MERIT see each fused QKV weight of a Megatron-core model as three matrices; the paper's default is one.

    Args:
        model: with Megatron-core's `SelfAttention` modules, tensor-parallel or not.

    Returns:
        The names of the weights that were marked.

    Raises:
        ValueError: the model has none, or one whose rows are not those of `fused_qkv`; nothing has been marked.
    """
    fused = fused_qkv(model)
    if not fused:
        raise ValueError("split_qkv: the model has no linear_qkv, as Megatron-core's SelfAttention has")
    for name, rows in fused.items():
        model.get_parameter(name).matrix_view = ("qkv", *rows)  # type: ignore[attr-defined]
    return list(fused)


def fused_qkv(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The fused QKV weights of a Megatron-core model.

    Their rows alternate by query group: the group's query heads, one key head, one value head.

    Args:
        model: with Megatron-core's `SelfAttention` modules, tensor-parallel or not.

    Returns:
        By name of the weight, its query rows of a group and its rows of a head; empty if there is none.

    Raises:
        ValueError: a weight's rows are not those.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        weight = getattr(getattr(module, "linear_qkv", None), "weight", None)
        if weight is None:
            continue
        head = module.hidden_size_per_attention_head
        query = module.num_attention_heads_per_partition // module.num_query_groups_per_partition * head
        groups = module.num_query_groups_per_partition
        name = f"{name}.linear_qkv.weight"
        if weight.shape[0] != groups * (query + 2 * head):
            raise ValueError(
                f"{name} has {weight.shape[0]} rows, but {groups} query groups of {query} + {head} + {head} rows "
                f"(query, key, value) have {groups * (query + 2 * head)}"
            )
        found[name] = (query, head)
    return found
