# SPDX-License-Identifier: Apache-2.0
"""The layout of DTensor parameters, as PyTorch's `fully_shard` (FSDP2) makes them.

Each parameter is cut by itself, between rows of its first dimension, as `torch.chunk` cuts: of 4 rows on 3 ranks the
ranks hold 2, 2 and none. So the flat buffer of `merit_ds.layout` is the parameter, and the slices end at its chunks.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.layout import ShardLayout
from merit_ds.megatron import tensor_parallel_group
from merit_ds.shard import Shard, logical_matrices

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. Who has none is spared the import, half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; a tensor that is no DTensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def same_sharding(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie on the ranks in the same way."""
    if is_distributed(first) and is_distributed(second):
        return first.placements == second.placements and first.device_mesh == second.device_mesh
    return not is_distributed(first) and not is_distributed(second)


def bind_distributed(tensor: "DTensor", original: Tensor, param_group: dict[str, Any]) -> Shard:
    """The shard of a parameter that is a DTensor.

    Args:
        original: the parameter that the optimizer was constructed with; its attributes count.

    Raises:
        UnsupportedError: on every rank alike, for a placement other than by rows over one dimension of the mesh. A
            local part that is not the rank's chunk is a `problem` of the returned shard, since others may not see it.
    """
    dimension = _sharded_dimension(tensor)
    matrices = logical_matrices(original, param_group)
    if dimension is None:
        bounds, rank, group = [0, tensor.numel()], 0, None
    else:
        world, rank = tensor.device_mesh.size(dimension), tensor.device_mesh.get_local_rank(dimension)
        rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
        chunk = -(-rows // world)
        bounds = [min(index * chunk, rows) * width for index in range(world + 1)]
        group = tensor.device_mesh.get_group(dimension) if world > 1 else None
    held, due = tensor.to_local().numel(), bounds[rank + 1] - bounds[rank]
    return Shard(
        tensor,
        ShardLayout.build(matrices, bounds=bounds, rank=rank),
        tuple(matrices),
        wrapper="DTensor",
        owners=(original,) * len(matrices),
        group=group,
        problem=None
        if held == due
        else f"a DTensor of shape {tuple(tensor.shape)} holds {held} elements on a rank whose chunk has {due}: "
        "distribute it by fully_shard or distribute_tensor",
    )


def refuse_unsupported(originals: Sequence[Tensor], current: Sequence[Tensor]) -> None:
    """Refuse FSDP1's flat parameters, DTensors beside tensor parallelism, and what `fully_shard` has replaced.

    Args:
        originals: the parameters that a group was constructed with.
        current: the tensors that it has now.
    """
    if any(getattr(original, "_fsdp_flattened", False) for original in originals):
        raise UnsupportedError(
            "Merit does not support FullyShardedDataParallel: use fully_shard (FSDP2), DDP or DeepSpeed ZeRO"
        )
    if tensor_parallel_group() is not None and any(map(is_distributed, current)):
        raise UnsupportedError(
            "Merit does not support DTensor parameters under Megatron's tensor parallelism: use fully_shard without it"
        )
    if any(hasattr(tensor, "_fsdp_orig_uid") for tensor in current):
        raise UnsupportedError(
            "Merit was constructed before fully_shard, which put new parameters in the model: construct it afterwards"
        )


def _sharded_dimension(tensor: "DTensor") -> int | None:
    """The dimension of the mesh over which rows are sharded; None where every rank has all."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement

    sharded = [index for index, placement in enumerate(tensor.placements) if placement != Replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or tensor.placements[sharded[0]] != ShardPlacement(0):
        raise UnsupportedError(
            f"Merit does not support a parameter of shape {tuple(tensor.shape)} with placements {tensor.placements}: "
            "it must be Shard(0) in one dimension of the mesh and Replicate() in others; use fully_shard without "
            "shard_placement_fn and without tensor parallelism"
        )
    return sharded[0]
