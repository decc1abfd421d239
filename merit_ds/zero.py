# SPDX-License-Identifier: Apache-2.0
"""The layout of DeepSpeed's flat ZeRO-1/2 partitions.

Of the optimizer's modules this one and `zero3` read DeepSpeed's private attributes, and three read one each: `binding`
asks by `_hp_mapping` whether parameters are partitioned, `shard` takes a shape from `ds_shape`, `megatron` the group of
automatic tensor parallelism.

DeepSpeedZeroOptimizer and BF16_Optimizer lay a group's low-precision parameters into one flat buffer, make every
`parameter.data` a view of it, and hand the optimizer a float32 copy of this rank's slice. So the buffer's real order
is read from the views themselves. `_hp_mapping` is not enough: with `round_robin_gradients` it describes an order
that the buffer does not have.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.layout import ShardLayout
from merit_ds.megatron import tensor_parallel_group
from merit_ds.shard import Shard, logical_matrices

_CHECKED_AT_ONCE = 1 << 22  # elements; bounds the check's scratch memory


def bind_flat_partition(param_group: dict[str, Any], originals: Sequence[Tensor]) -> Shard:
    """The shard of a group whose parameters DeepSpeed has flattened.

    Args:
        param_group: holds this rank's slice, one flat float32 tensor.
        originals: the group's parameters; those that are frozen or empty are not in the buffer.

    Raises:
        UnsupportedError: on every rank alike, where the buffer is not what ZeRO-1/2 makes. A slice whose values
            are not the model's is a `problem` of the returned shard, since other ranks may not see it.
    """
    refuse_scaled_autocast()
    members = [parameter for parameter in originals if hasattr(parameter, "_dp_group")]
    tensors = param_group["params"]
    if len(tensors) != 1 or tensors[0].dim() != 1 or tensors[0].dtype != torch.float32:
        raise UnsupportedError(
            "Merit expects one flat float32 partition for each group: remove bf16_master_weights_and_grads and "
            "fp16_master_weights_and_grads from the DeepSpeed JSON"
        )
    flat = tensors[0]
    group = members[0]._dp_group or dist.group.WORLD
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    buffer = _flat_buffer(members, world * flat.numel())
    _refuse_overlaps(members, buffer.numel())
    pairs = sorted(
        ((m, p) for p in members for m in logical_matrices(p, param_group, start=int(p.storage_offset()))),
        key=lambda pair: pair[0].start,
    )
    matrices = tuple(matrix for matrix, _ in pairs)
    owners = tuple(parameter for _, parameter in pairs)
    bounds = [index * flat.numel() for index in range(world + 1)]
    layout = ShardLayout.build(matrices, bounds=bounds, rank=rank)
    return Shard(
        flat,
        layout,
        matrices,
        # The attribute is set by one of the two classes only, for its gradient accumulation.
        wrapper="DeepSpeedZeroOptimizer" if hasattr(members[0], "grad_accum") else "BF16_Optimizer",
        owners=owners,
        group=group if world > 1 else None,
        tensor_group=tensor_parallel_group(),
        problem=value_problem(layout, flat, buffer[bounds[rank] : bounds[rank + 1]]),
    )


def _flat_buffer(members: Sequence[Tensor], size: int) -> Tensor:
    """The low-precision buffer [size] of which every member is a view."""
    storage = members[0].untyped_storage()
    shared = all(
        parameter.untyped_storage().data_ptr() == storage.data_ptr() and parameter.is_contiguous()
        for parameter in members
    )
    if not shared or storage.nbytes() != size * members[0].element_size():
        raise UnsupportedError(
            "Merit cannot find the model's parameters in one flat buffer, as zero_optimization.stage 1 and 2 make it: "
            "do not move the model's storage after deepspeed.initialize"
        )
    flat = torch.empty(0, dtype=members[0].dtype, device=members[0].device)
    flat.set_(storage, 0, (size,), (1,))
    return flat


def _refuse_overlaps(members: Sequence[Tensor], size: int) -> None:
    spans = sorted((int(p.storage_offset()), int(p.storage_offset()) + p.numel()) for p in members)
    ends = [0, *(end for _, end in spans)]
    if any(begin < end for (begin, _), end in zip(spans, ends, strict=False)) or ends[-1] > size:
        raise UnsupportedError("Merit found parameters that overlap in ZeRO's flat buffer")


def value_problem(layout: ShardLayout, flat: Tensor, low_precision: Tensor) -> str | None:
    """Whether the float32 slice holds the model's values, as it must whenever no step is under way."""
    pieces = [(piece, f.matrix) for f in (*layout.cut, *layout.whole) for piece in f.rectangles()]
    for piece, matrix in pieces:
        stop = piece.offset + piece.rows * piece.cols
        for begin in range(piece.offset, stop, _CHECKED_AT_ONCE):
            run = slice(begin, min(begin + _CHECKED_AT_ONCE, stop))
            master = flat.detach()[run].to(device=low_precision.device, dtype=low_precision.dtype)
            if torch.equal(master, low_precision[run]):
                continue
            return (
                f"ZeRO's float32 weights are not the model's (in a weight of {matrix.rows} x {matrix.cols}"
                "): after a change of the model's weights, call "
                "engine.optimizer.refresh_fp32_params() before the first step; else remove the key of "
                "zero_optimization that reorders them"
            )
    return None


def refuse_scaled_autocast() -> None:
    """torch's GradScaler, which DeepSpeed uses here, may skip the step on one rank and leave the others waiting."""
    autocast = sys.modules.get("deepspeed.runtime.torch_autocast")
    if autocast is not None and autocast.is_autocast_initialized() and autocast.get_autocast_dtype() == torch.float16:
        raise UnsupportedError("Merit does not support torch_autocast.dtype float16 under ZeRO: use bfloat16")
