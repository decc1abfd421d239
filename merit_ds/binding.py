# SPDX-License-Identifier: Apache-2.0
"""From the tensors that an optimizer is handed to the layout of the weights they hold."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.layout import ShardLayout
from merit_ds.shard import Shard, logical_matrices
from merit_ds.zero import bind_flat_partition, tensor_parallel_size


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
    """
    _refuse_unsupported(originals)
    if [original.shape for original in originals] != list(shapes):
        raise UnsupportedError(
            "a wrapper has changed the parameters' shapes since Merit was constructed: not supported"
        )
    current = param_group["params"]
    if len(current) == len(originals) and all(new is old for new, old in zip(current, originals, strict=True)):
        return [_whole(tensor, tensor, param_group) for tensor in current]
    if any(hasattr(original, "_hp_mapping") for original in originals):
        return [bind_flat_partition(param_group, originals)]
    trainable = [original for original in originals if original.requires_grad and original.numel()]
    if [tensor.shape for tensor in current] == [original.shape for original in trainable]:
        return [_whole(clone, original, param_group) for clone, original in zip(current, trainable, strict=True)]
    raise UnsupportedError(
        "Merit does not recognise the wrapper that replaced its parameters: it knows plain PyTorch and DeepSpeed's "
        "zero_optimization.stage 0, 1 and 2"
    )


def _whole(tensor: Tensor, original: Tensor, param_group: dict[str, Any]) -> Shard:
    """The shard of a whole parameter, or of a float32 copy of one, as DeepSpeed's FP16_UnfusedOptimizer makes them."""
    if not tensor.is_contiguous():
        raise UnsupportedError(f"Merit needs contiguous parameters: make the one of {tuple(tensor.shape)} so")
    matrices = logical_matrices(original, param_group)
    layout = ShardLayout.build(matrices, bounds=[0, tensor.numel()], rank=0)
    if tensor is original:
        return Shard(tensor, layout, tuple(matrices), wrapper="none")
    unfused = "deepspeed.runtime.fp16.unfused_optimizer" in sys.modules and original.dtype != torch.float32
    return Shard(tensor, layout, tuple(matrices), wrapper="FP16_UnfusedOptimizer" if unfused else "float32 copies")


def _refuse_unsupported(originals: Sequence[Tensor]) -> None:
    if any(hasattr(original, "ds_id") for original in originals):
        raise UnsupportedError("Merit does not support zero_optimization.stage 3: set it to 1 or 2")
    if any(
        type(original).__name__ == "DTensor" or getattr(original, "_fsdp_flattened", False) for original in originals
    ):
        raise UnsupportedError("Merit does not support FSDP's sharded parameters: use DeepSpeed ZeRO-1/2 or DDP")
    size = max(_megatron_tensor_parallel_size(), tensor_parallel_size())
    if size > 1:
        raise UnsupportedError(
            f"Merit does not support tensor parallelism, found {size} ranks: set tensor_model_parallel_size "
            "(DeepSpeed: tensor_parallel.autotp_size) to 1"
        )


def _megatron_tensor_parallel_size() -> int:
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return 1
    return max(int(state.get_tensor_model_parallel_world_size()), int(state.get_expert_tensor_parallel_world_size()))
