# SPDX-License-Identifier: Apache-2.0
"""Maxima over a process group, exact and NaN-safe, and sums in a fixed order."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

_CLEAR_SIGN = 0x7FFFFFFF


class Exchange(ABC):
    """Brings the ranks' parts of something together, in place, while other work goes on."""

    @abstractmethod
    def __init__(self, parts: Tensor, *, group: dist.ProcessGroup) -> None: ...

    @abstractmethod
    def start(self) -> None:
        """Begin; the parts must not be touched until `wait` returns."""

    @abstractmethod
    def wait(self) -> None:
        """Block (on CUDA: the current stream) until the parts are the group's; harmless when repeated."""


class MaxExchange(Exchange):
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
        self._bits.bitwise_and_(_CLEAR_SIGN)  # a NaN's sign would sort below zero
        self._sent = self._bits.to(collective_device(self._group, self._bits.device))
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> None:
        assert self._work is not None and self._sent is not None, "start() comes first"
        self._work.wait()
        if self._sent.data_ptr() != self._bits.data_ptr():
            self._bits.copy_(self._sent)


class SumExchange(Exchange):
    """Sums of float64 parts, contiguous, of any shape, added in the order of the ranks.

    An all-reduce adds in an order of its own, which may change with the ranks' places in the network. So the parts are
    gathered, the group's size times their bytes, and every rank adds them up alike.
    """

    def __init__(self, parts: Tensor, *, group: dist.ProcessGroup) -> None:
        self._parts = parts
        self._group = group
        self._work: dist.Work | None = None
        self._gathered: list[Tensor] = []

    def start(self) -> None:
        sent = self._parts.to(collective_device(self._group, self._parts.device))
        self._gathered = [torch.empty_like(sent) for _ in range(dist.get_world_size(self._group))]
        self._work = dist.all_gather(self._gathered, sent, group=self._group, async_op=True)

    def wait(self) -> None:
        assert self._work is not None, "start() comes first"
        self._work.wait()
        if self._gathered:
            total, *others = self._gathered
            for part in others:
                total += part
            self._parts.copy_(total)
            self._gathered = []


def add_disjoint(values: Tensor, *, group: dist.ProcessGroup) -> None:
    """Put together, in place, what ranks hold of a tensor: where one has a value, others have zero, so it is exact."""
    sent = values.to(collective_device(group, values.device))
    dist.all_reduce(sent, op=dist.ReduceOp.SUM, group=group)
    if sent.data_ptr() != values.data_ptr():
        values.copy_(sent)


def largest(values: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The largest of each integer over the group's ranks, in a new tensor; waits for it."""
    result = values.to(collective_device(group, values.device), copy=True)
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def collective_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where the group's backend can take tensors of `device`: NCCL takes none on the CPU. None: the default group."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
