# SPDX-License-Identifier: Apache-2.0
"""From the tensors that an optimizer is handed to the layout of the weights they hold."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import bind_distributed, is_distributed, refuse_unsupported
from merit_ds.layout import ShardLayout
from merit_ds.megatron import replication_problem, tensor_parallel_group
from merit_ds.shard import Shard, is_trained, logical_matrices
from merit_ds.validation import check_dtype
from merit_ds.zero import bind_flat_partition
from merit_ds.zero3 import bind_sub_group, is_partitioned, sub_groups


def bind(param_group: dict[str, Any], originals: Sequence[Tensor], *, shapes: Sequence[torch.Size]) -> list[Shard]:
    """Find out what the tensors in `param_group["params"]` hold.

    Args:
        param_group: the optimizer's group as it is at `step()`; DeepSpeed may have replaced its tensors.
        originals: the parameters that the group was constructed with.
        shapes: their shapes at that time.

    Returns:
        A shard for each tensor, in the group's order.

    Raises:
        UnsupportedError: on every rank alike, where the layout is not one that is known to be right.
        ValueError: a parameter that was frozen when it was given is trained, and has no defined step.
    """
    current = param_group["params"]
    refuse_unsupported(originals, current)
    if is_partitioned(originals):
        return [bind_sub_group(flat, param_group, originals) for flat in current]
    if [original.shape for original in originals] != list(shapes):
        raise UnsupportedError(
            "a wrapper has changed the parameters' shapes since Merit was constructed: not supported"
        )
    tensor_group = tensor_parallel_group()
    if tensor_group is not None:
        problem = replication_problem(originals, tensor_group)
        if problem is not None:
            raise UnsupportedError(problem)
    if len(current) == len(originals) and all(map(_stands_for, current, originals)):
        return [_single(new, old, param_group) for new, old in zip(current, originals, strict=True)]
    if any(hasattr(original, "_hp_mapping") for original in originals):
        return [bind_flat_partition(param_group, originals)]
    trainable = [original for original in originals if original.requires_grad and original.numel()]
    if [tensor.shape for tensor in current] == [original.shape for original in trainable]:
        return [_single(clone, original, param_group) for clone, original in zip(current, trainable, strict=True)]
    given = set(map(id, originals))
    if any(id(tensor) in given for tensor in current):
        raise UnsupportedError(
            f"a group's list of parameters was changed after it was given to Merit, from {len(originals)} to "
            f"{len(current)}: give further ones to add_param_group, and leave the list as it is"
        )
    raise UnsupportedError(
        "Merit does not recognise the wrapper that replaced its parameters: it knows plain PyTorch, fully_shard, and "
        "DeepSpeed's zero_optimization.stage 0, 1, 2 and 3"
    )


def stepped_tensors(param_group: dict[str, Any], originals: Sequence[Tensor]) -> Sequence[Tensor]:
    """All tensors of a group: those in it, or those that ZeRO-3 puts there one at a time."""
    return sub_groups(originals) if is_partitioned(originals) else param_group["params"]


def is_dry_run(shards: Sequence[Shard], state: Mapping[Tensor, Any]) -> bool:
    """Whether a step is the one on zero gradients by which FP16_UnfusedOptimizer's constructor creates state.

    For Adam it is nearly harmless; a trust ratio turns the bare decay term into a full step.

    Args:
        state: the optimizer's.
    """
    return all(
        shard.wrapper == "FP16_UnfusedOptimizer"
        and shard.tensor not in state
        and shard.tensor.grad is not None
        and not shard.tensor.grad.any()
        for shard in shards
    )


def _stands_for(tensor: Tensor, original: Tensor) -> bool:
    """Whether a tensor is the parameter itself, or the DTensor that Accelerate puts in its place."""
    return tensor is original or (is_distributed(tensor) and tensor.shape == original.shape)


def _single(tensor: Tensor, original: Tensor, param_group: dict[str, Any]) -> Shard:
    """The shard of one parameter, or of a float32 copy of it, as DeepSpeed's FP16_UnfusedOptimizer makes them."""
    if not is_trained(tensor) and not is_trained(original):
        return Shard(tensor, ShardLayout.build([], bounds=[0, 0], rank=0), (), wrapper="none", idle=True)
    check_dtype(tensor, name="Merit")
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"Merit needs contiguous parameters, and one of shape {tuple(tensor.shape)} is not: set p.data = "
            "p.data.contiguous(), or after channels_last model.to(memory_format=torch.contiguous_format)"
        )
    if is_distributed(tensor):
        return bind_distributed(tensor, original, param_group)
    matrices = logical_matrices(original, param_group)
    layout = ShardLayout.build(matrices, bounds=[0, tensor.numel()], rank=0)
    unfused = "deepspeed.runtime.fp16.unfused_optimizer" in sys.modules and original.dtype != torch.float32
    owners = (original,) * len(matrices)
    wrapper = "none" if tensor is original else "FP16_UnfusedOptimizer" if unfused else "float32 copies"
    return Shard(tensor, layout, tuple(matrices), wrapper=wrapper, owners=owners, tensor_group=tensor_parallel_group())
