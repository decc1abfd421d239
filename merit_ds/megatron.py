# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism as Megatron declares it: which axis of a weight is split, and over which ranks.

Megatron's parallel layers set `tensor_model_parallel` and `partition_dim` on their parameters. A parameter without the
first is taken to be the same on all tensor-parallel ranks, and `replication_problem` checks that it is.
"""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from merit_ds.collectives import largest
from merit_ds.errors import UnsupportedError


def split_axis(parameter: Tensor) -> Literal["rows", "cols"] | None:
    """The axis along which tensor-parallel ranks hold parts of a parameter; None where each has it all.

    Raises:
        ValueError: the parameter is split and has more than two dimensions, or does not say along which.
    """
    if not getattr(parameter, "tensor_model_parallel", False) or tensor_parallel_group() is None:
        return None
    axis = getattr(parameter, "partition_dim", None)
    if parameter.dim() > 2 or axis not in range(parameter.dim()):
        raise ValueError(
            f"a tensor-parallel parameter of shape {tuple(parameter.shape)} has partition_dim {axis}: Merit supports "
            "parameters of one and two dimensions, split along one of them; set expert_tensor_parallel_size to 1"
        )
    return "rows" if axis == 0 else "cols"


def tensor_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that share this rank's layers: Megatron-core's, or those of the `mpu` that DeepSpeed was given.

    Returns:
        None where nothing is split.

    Raises:
        UnsupportedError: layers are split in a way that says nothing about it on the parameters.
    """
    groups = sys.modules.get("deepspeed.utils.groups")
    automatic = None if groups is None else groups._TENSOR_MODEL_PARALLEL_GROUP
    if automatic is not None and automatic.size() > 1:
        raise UnsupportedError(
            "Merit does not support DeepSpeed's automatic tensor parallelism: set tensor_parallel.autotp_size to 1"
        )
    group = _megatron_group() or (None if groups is None or groups.mpu is None else _mpu_group(groups.mpu))
    return None if group is None or dist.get_world_size(group) == 1 else group


def replication_problem(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> str | None:
    """Whether parameters that are not split are the same on all ranks of the tensor-parallel group. A collective.

    It looks at the values: slices that do not say so and happen to be equal, such as biases of zero, pass.

    Args:
        parameters: as many on every rank, in the same order; those that are split count by their shapes.

    Returns:
        What is wrong, the same on every rank; else None.
    """
    marks = torch.tensor([_fingerprint(parameter) for parameter in parameters], dtype=torch.int64, device="cpu")
    if parameters:
        marks = marks.to(parameters[0].device)
    both = torch.stack((marks, -marks))
    high, low = largest(both, group=group)
    different = (high != -low).nonzero().flatten().tolist()
    if not different:
        return None
    shape = tuple(parameters[different[0]].shape)
    return (
        f"a parameter of shape {shape} differs between tensor-parallel ranks and does not say how it is split: "
        "Megatron's layers set tensor_model_parallel and partition_dim on their parameters, others must too"
    )


def _fingerprint(parameter: Tensor) -> int:
    """Differs where the shape or, of a parameter that is not split, the values do."""
    shape = hash(tuple(parameter.shape)) & 0xFFFF_FFFF
    if split_axis(parameter) is not None or parameter.numel() == 0:
        return shape
    bits = parameter.detach().contiguous().view(getattr(torch, f"int{8 * parameter.element_size()}"))
    return shape + int(bits.sum(dtype=torch.int64))


def _megatron_group() -> dist.ProcessGroup | None:
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    if state.get_expert_tensor_parallel_world_size() > 1 and state.get_expert_model_parallel_world_size() > 1:
        raise UnsupportedError("Merit does not support tensor-parallel experts: set expert_tensor_parallel_size to 1")
    group: dist.ProcessGroup = state.get_tensor_model_parallel_group()
    return group


def _mpu_group(mpu: Any) -> dist.ProcessGroup | None:
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size

    if bwc_tensor_model_parallel_world_size(mpu) == 1:
        return None
    group: dist.ProcessGroup = bwc_tensor_model_parallel_group(mpu)
    return group
