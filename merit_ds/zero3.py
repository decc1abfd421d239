# SPDX-License-Identifier: Apache-2.0
"""The layout of DeepSpeed's ZeRO-3 sub-groups.

ZeRO-3 cuts each parameter by itself: flattened and padded, into one equal part for each rank. It hands the optimizer
float32 copies of this rank's parts of some parameters, a "sub-group", end to end; A is [5] and B is [3] here:

    rank 0's sub-group            rank 1's sub-group
    [ A0 A1 A2 | B0 B1 ]          [ A3 A4 pad | B2 pad ]

So each parameter is a flat buffer with a `ShardLayout` of its own, and a sub-group concatenates them.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.megatron import tensor_parallel_group
from merit_ds.shard import Shard, logical_matrices
from merit_ds.zero import refuse_scaled_autocast, value_problem


def is_partitioned(parameters: Sequence[Tensor]) -> bool:
    """Whether ZeRO-3 or `deepspeed.zero.Init` has taken any of them."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def sub_groups(originals: Sequence[Tensor]) -> list[Tensor]:
    """This rank's flat tensors of a group, in DeepSpeed's order: one in which nothing is trained has none.

    DeepSpeed puts one at a time into the group's `params`, and steps it.

    Args:
        originals: the group's parameters.
    """
    own = {id(original) for original in originals}
    wrapper = _wrapper(originals)
    members = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
    return [flat for flat, parameters in members if id(parameters[0]) in own]


def bind_sub_group(flat: Tensor, param_group: dict[str, Any], originals: Sequence[Tensor]) -> Shard:
    """The shard of one sub-group.

    Args:
        flat: this rank's parts of the sub-group's parameters, float32.
        param_group: the group it is of.
        originals: the group's parameters.

    Raises:
        UnsupportedError: on every rank alike, where the sub-group is not what ZeRO-3 makes. One whose values are not
            the model's is a `problem` of the returned shard, since other ranks may not see it.
    """
    wrapper = _wrapper(originals)
    _refuse_unsupported(wrapper)
    members = _members(flat, wrapper)
    group = members[0].ds_process_group
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    layouts: list[ShardLayout] = []
    matrices: list[Matrix] = []
    owners: list[Tensor] = []
    offsets = [0]
    problem = None
    for parameter in members:
        part = parameter.ds_tensor
        found = logical_matrices(parameter, param_group)
        layout = ShardLayout.build(found, bounds=[number * part.numel() for number in range(world + 1)], rank=rank)
        problem = problem or value_problem(layout, flat[offsets[-1] : offsets[-1] + part.numel()], part)
        layouts.append(layout)
        matrices += found
        owners += [parameter] * len(found)
        offsets.append(offsets[-1] + part.numel())
    return Shard(
        flat,
        ShardLayout.concatenate(layouts, offsets=offsets[:-1]),
        tuple(matrices),
        wrapper=type(wrapper).__name__,
        owners=tuple(owners),
        group=group if world > 1 else None,
        problem=problem,
    )


def _members(flat: Tensor, wrapper: Any) -> list[Any]:
    """The parameters of which a sub-group holds parts, in its order."""
    for known, members in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        if known is flat and sum(parameter.ds_tensor.numel() for parameter in members) == flat.numel():
            return list(members)
    raise UnsupportedError("Merit does not find its tensor among ZeRO-3's sub-groups: call step by the engine")


def _wrapper(originals: Sequence[Tensor]) -> Any:
    """DeepSpeed's optimizer around Merit."""
    for original in originals:
        if hasattr(original, "_z3_optimizer"):
            return original._z3_optimizer
    raise UnsupportedError(
        "the parameters were made under deepspeed.zero.Init, but no engine steps them: set zero_optimization.stage to 3"
    )


def _refuse_unsupported(wrapper: Any) -> None:
    refuse_scaled_autocast()
    if tensor_parallel_group() is not None:
        raise UnsupportedError("Merit does not support tensor parallelism with zero_optimization.stage 3: use 1 or 2")
    if type(wrapper).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        raise UnsupportedError(
            f"Merit does not support DeepSpeed's {type(wrapper).__name__}: remove mics_shard_size and "
            "offload_optimizer.super_offload from zero_optimization"
        )
    for present, key in (
        (wrapper.zenflow, "zenflow"),
        (wrapper.swap_optimizer, "offload_optimizer.device nvme"),
        (wrapper.params_in_nvme_and_cpu, "offload_param.device nvme"),
    ):
        if present:
            raise UnsupportedError(f"Merit does not support zero_optimization.{key} with stage 3: remove it")
