# SPDX-License-Identifier: Apache-2.0
"""From an optimizer's tensors and their gradients to what a kernel can take: this rank's parts, contiguous."""

import weakref
from collections.abc import Callable, Sequence
from operator import call, is_
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import is_distributed, local_part, same_sharding
from merit_ds.ops.table import Operands
from merit_ds.shard import Shard


class Gatherer:
    """Makes the operands of each step; they share the memory of what they stand for.

    Looking at a tensor from Python costs about 0.1 us, as much for 300 weights as the kernel takes for small ones. So a
    gradient that was there in the last step is examined only for what another `.data` would change, and none is held.

    Args:
        shards: whose tensors are stepped.
        moments: the names of the tensors in their states.
    """

    def __init__(self, shards: Sequence[Shard], *, moments: Sequence[str]) -> None:
        self._shards = shards
        self._names = moments
        self._weights = [shard.tensor for shard in shards]
        self._shapes = [weight.shape for weight in self._weights]
        self._sizes = [local_part(weight).numel() for weight in self._weights]
        self._distributed = any(map(is_distributed, self._weights))
        self._seen: list[Callable[[], Tensor | None]] = []
        self._present_sizes: list[int] = []

    def __call__(self, grads: Sequence[Tensor | None], states: Sequence[dict[str, Any] | None]) -> Operands:
        """The operands of this step.

        Args:
            grads: the tensors' gradients.
            states: the tensors' states, with their moments; one without a gradient may have none.

        Raises:
            UnsupportedError: a gradient is sparse, sharded otherwise than its parameter, or missing under ZeRO, or a
                weight is not contiguous any more.
        """
        weights: Sequence[Tensor] = self._weights
        moments = [[None if state is None else state[name] for state in states] for name in self._names]
        if self._distributed:
            weights = [local_part(weight.detach()) for weight in weights]
            moments = [[None if tensor is None else local_part(tensor) for tensor in tensors] for tensors in moments]
        if not all(map(Tensor.is_contiguous, weights)):
            raise UnsupportedError(
                "Merit needs contiguous parameters, and one has been made otherwise since the first step: set p.data = "
                "p.data.contiguous(), or after channels_last model.to(memory_format=torch.contiguous_format)"
            )
        return Operands(weights, self._usable(grads), *moments)

    def _usable(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if self._seen and all(map(is_, map(call, self._seen), grads)):
            # A reference to what is gone gives None too: as many sizes as before say that no gradient went missing.
            present = [grad for grad in grads if grad is not None]
            if all(map(Tensor.is_contiguous, present)) and list(map(Tensor.numel, present)) == self._present_sizes:
                return grads
        usable = [_usable(*each) for each in zip(grads, self._shards, self._shapes, strict=True)]
        as_they_are = all(map(is_, usable, grads))
        self._seen = [_nothing if grad is None else weakref.ref(grad) for grad in grads] if as_they_are else []
        self._present_sizes = [size for size, grad in zip(self._sizes, grads, strict=True) if grad is not None]
        return usable


def _usable(grad: Tensor | None, shard: Shard, shape: torch.Size) -> Tensor | None:
    """This rank's part of a gradient, contiguous: the gradient itself where it is so already."""
    if grad is None:
        # DeepSpeed gives every partition one, so this happens on all ranks or none.
        if shard.group is not None and not is_distributed(shard.tensor):
            raise UnsupportedError("a partition of zero_optimization has no gradient: call step by the engine")
        return None
    if grad.layout is not torch.strided:
        raise UnsupportedError("Merit does not support sparse gradients: use dense ones (sparse=False)")
    if not same_sharding(shard.tensor, grad):
        raise UnsupportedError("a gradient is not sharded as its parameter is: redistribute it before the step")
    if grad.shape != shape:
        raise UnsupportedError(
            f"a gradient has shape {tuple(grad.shape)} and its parameter had {tuple(shape)} in the first step: a "
            "parameter that changes its shape needs a new optimizer"
        )
    return local_part(grad).contiguous().resolve_neg()


def _nothing() -> None:
    """In a weak reference's place, where there is no gradient."""
