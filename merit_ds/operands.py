# SPDX-License-Identifier: Apache-2.0
"""From an optimizer's tensors and their gradients to what a kernel can take: this rank's parts, contiguous."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import is_distributed, local_part, same_sharding
from merit_ds.ops.table import Operands
from merit_ds.shard import Shard
from merit_ds.validation import MOMENTS


def gather(
    shards: Sequence[Shard],
    grads: Sequence[Tensor | None],
    states: Sequence[dict[str, Any] | None],
    *,
    distributed: bool,
) -> Operands:
    """The operands of a step: all share the memory of what they stand for, but gradients that are not contiguous.

    Args:
        shards: whose tensors are stepped.
        grads: the tensors' gradients.
        states: the tensors' states, with their moments; one without a gradient may have none.
        distributed: whether any of the tensors is a DTensor.

    Raises:
        UnsupportedError: a gradient is sparse, sharded otherwise than its parameter, or missing under ZeRO.
    """
    weights = [shard.tensor for shard in shards]
    exp_avgs, exp_avg_sqs = ([None if state is None else state[name] for state in states] for name in MOMENTS)
    if distributed:
        weights = [local_part(weight.detach()) for weight in weights]
        exp_avgs, exp_avg_sqs = (
            [None if tensor is None else local_part(tensor) for tensor in tensors]
            for tensors in (exp_avgs, exp_avg_sqs)
        )
    if distributed or not all(grad is not None and _is_usable(grad) for grad in grads):
        grads = [_usable(grad, shard) for grad, shard in zip(grads, shards, strict=True)]
    return Operands(weights, grads, exp_avgs, exp_avg_sqs)


def _is_usable(grad: Tensor) -> bool:
    return grad.layout is torch.strided and grad.is_contiguous()


def _usable(grad: Tensor | None, shard: Shard) -> Tensor | None:
    if grad is None:
        # DeepSpeed gives every partition one, so this happens on all ranks or none.
        if shard.group is not None and not is_distributed(shard.tensor):
            raise UnsupportedError("a partition of zero_optimization has no gradient: call step by the engine")
        return None
    if grad.layout is not torch.strided:
        raise UnsupportedError("Merit does not support sparse gradients: use dense ones (sparse=False)")
    if not same_sharding(shard.tensor, grad):
        raise UnsupportedError("a gradient is not sharded as its parameter is: redistribute it before the step")
    return local_part(grad).contiguous()
