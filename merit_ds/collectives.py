# SPDX-License-Identifier: Apache-2.0
"""The maximum over a process group, exact and NaN-safe."""

import torch
import torch.distributed as dist
from torch import Tensor

_CLEAR_SIGN = 0x7FFFFFFF


class MaxExchange:
    """One all-reduce MAX, in place, over float32 maxima of absolute values, contiguous, of any shape.

    The bits travel as int32. For non-negative floats integer order is float order, and NaN sorts above Inf:
    gloo's and NCCL's float MAX would drop a NaN that only one rank holds.
    """

    def __init__(self, maxima: Tensor, *, group: dist.ProcessGroup) -> None:
        self._bits = maxima.view(torch.int32)
        self._group = group
        self._work: dist.Work | None = None
        self._sent: Tensor | None = None

    def start(self) -> None:
        """Begin the all-reduce; the maxima must not be touched until `wait` returns."""
        self._bits.bitwise_and_(_CLEAR_SIGN)  # a NaN's sign would sort below zero
        self._sent = self._bits.to(_collective_device(self._group, self._bits.device))
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> None:
        """Block (on CUDA: the current stream) until the maxima are the group's; harmless when repeated."""
        assert self._work is not None and self._sent is not None, "start() comes first"
        self._work.wait()
        if self._sent.data_ptr() != self._bits.data_ptr():
            self._bits.copy_(self._sent)


def largest(values: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The largest of each integer over the group's ranks, in a new tensor; waits for it."""
    result = values.to(_collective_device(group, values.device), copy=True)
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def _collective_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where the group's backend can reduce: NCCL takes no CPU tensors, as optimizer offload has them."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
