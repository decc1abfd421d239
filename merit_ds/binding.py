# SPDX-License-Identifier: Apache-2.0
"""From the tensors that an optimizer is handed to the layout of the weights they hold."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.layout import Matrix, ShardLayout

MATRIX_VIEWS = ("stack", "flatten")


@dataclass(frozen=True)
class Shard:
    """One tensor of an optimizer's group, and what it holds.

    Attributes:
        tensor: the float tensor that a step changes; any shape, contiguous.
        layout: its fragments, by element of the flattened tensor.
        matrices: the logical weights of the whole group of ranks, for reports.
        wrapper: who holds the master weights, for reports.
        group: the ranks to exchange maxima with; None where every weight is whole.
        clone_of: the low-precision parameter whose float32 copy `tensor` is, else None.
        problem: why this rank must refuse, else None. Found on one rank only, it is told to the others in
            the exchange, so that none is left waiting.
    """

    tensor: Tensor
    layout: ShardLayout
    matrices: tuple[Matrix, ...]
    wrapper: str
    group: dist.ProcessGroup | None = None
    clone_of: Tensor | None = None
    problem: str | None = None


def logical_matrices(parameter: Tensor, param_group: dict[str, Any], *, start: int = 0) -> list[Matrix]:
    """The matrices of which one parameter consists; none if it has no elements.

    Args:
        parameter: any shape. Three or more dimensions need a `matrix_view`: an attribute of the parameter or a key of
            its group, "stack" ([E, R, C] is E matrices, as experts are) or "flatten" ([O, I, kH, kW] is the
            matrix [O, I*kH*kW], as a convolution is).
        start: the parameter's first element in the flat buffer.

    Raises:
        ValueError: three or more dimensions without a view, or an unknown view.
    """
    if parameter.numel() == 0:
        return []
    shape = parameter.shape
    if len(shape) < 2:
        return [Matrix(start, 1, parameter.numel(), is_vector=True)]
    if len(shape) == 2:
        return [Matrix(start, shape[0], shape[1])]
    view = getattr(parameter, "matrix_view", None) or param_group.get("matrix_view")
    if view == "flatten":
        return [Matrix(start, shape[0], math.prod(shape[1:]))]
    if view == "stack":
        rows, cols = shape[-2:]
        return [Matrix(begin, rows, cols) for begin in range(start, start + parameter.numel(), rows * cols)]
    raise ValueError(
        f"a parameter of shape {tuple(shape)} has matrix_view {view!r}: set the parameter's attribute or its group's "
        "key matrix_view to 'stack' (the last two dimensions are a matrix) or 'flatten' (a row per first index)"
    )


def bind(param_group: dict[str, Any], originals: Sequence[Tensor]) -> list[Shard]:
    """Find out what the tensors in `param_group["params"]` hold.

    Args:
        param_group: the optimizer's group as it is at `step()`; DeepSpeed may have replaced its tensors.
        originals: the parameters that the group was constructed with.

    Returns:
        A shard for each tensor, in the group's order.

    Raises:
        UnsupportedError: on every rank alike, where the layout is not one that is known to be right.
    """
    _refuse_unsupported(originals)
    current = param_group["params"]
    if len(current) == len(originals) and all(new is old for new, old in zip(current, originals, strict=True)):
        return [_alone(tensor, tensor, param_group) for tensor in current]
    if any(hasattr(original, "_hp_mapping") for original in originals):
        from merit_ds.zero import bind_flat_partition

        return [bind_flat_partition(param_group, originals)]
    trainable = [original for original in originals if original.requires_grad and original.numel()]
    if [tensor.shape for tensor in current] == [original.shape for original in trainable]:
        return [_alone(clone, original, param_group) for clone, original in zip(current, trainable, strict=True)]
    raise UnsupportedError(
        "Merit does not recognise the wrapper that replaced its parameters: it knows plain PyTorch and DeepSpeed's "
        "zero_optimization.stage 0, 1 and 2"
    )


def _alone(tensor: Tensor, original: Tensor, param_group: dict[str, Any]) -> Shard:
    """A whole parameter, or DeepSpeed's float32 clone of one (FP16_UnfusedOptimizer)."""
    if not tensor.is_contiguous():
        raise UnsupportedError(f"Merit needs contiguous parameters: make the one of {tuple(tensor.shape)} so")
    matrices = logical_matrices(original, param_group)
    layout = ShardLayout.build(matrices, bounds=[0, tensor.numel()], rank=0)
    if tensor is original:
        return Shard(tensor, layout, tuple(matrices), wrapper="none")
    return Shard(tensor, layout, tuple(matrices), wrapper="FP16_UnfusedOptimizer", clone_of=original)


def _refuse_unsupported(originals: Sequence[Tensor]) -> None:
    if any(hasattr(original, "ds_id") for original in originals):
        raise UnsupportedError("Merit does not support zero_optimization.stage 3: set it to 1 or 2")
    if any(type(original).__name__ == "DTensor" for original in originals):
        raise UnsupportedError("Merit does not support DTensor parameters (FSDP2): use DeepSpeed ZeRO-1/2 or DDP")
    size = max(_megatron_tensor_parallel_size(), _deepspeed_tensor_parallel_size())
    if size > 1:
        raise UnsupportedError(
            f"Merit does not support tensor parallelism, found {size} ranks: set tensor_model_parallel_size "
            "(DeepSpeed: tensor_parallel.autotp_size) to 1"
        )


def _megatron_tensor_parallel_size() -> int:
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return 1
    return int(state.get_tensor_model_parallel_world_size())


def _deepspeed_tensor_parallel_size() -> int:
    """Set by a script's `mpu`, or by DeepSpeed's automatic tensor parallelism."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is None:
        return 1
    automatic = groups._TENSOR_MODEL_PARALLEL_GROUP
    return max(int(groups._get_model_parallel_world_size()), 1 if automatic is None else automatic.size())
