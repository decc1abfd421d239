# SPDX-License-Identifier: Apache-2.0
"""Names the ranks for which all others wait: a step takes as long as its slowest rank's."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from merit_ds.training.agreement import together

STEPS = 50
"""After each so many steps the ranks compare what they took."""
SLOW = 1.5
"""A rank is slow that takes so many times the ranks' median, ..."""
FELT = 0.05
"""... if the others then wait for so much of a step at least."""
NAMED = 4
"""Ranks that a line names; of more it says how many."""


class Taken(NamedTuple):
    """What a rank took for a step, on average.

    Attributes:
        seconds: for its first micro-batch's data and forward pass.
        step: seconds of the whole step, evaluations and checkpoints between the steps included.
    """

    host: str
    seconds: float
    step: float


class Pace:
    """How long this rank takes for what it waits for nobody in: reading a step's first micro-batch and going forward.

    Backward passes hold collectives under ZeRO-1 and 2, in which a fast rank takes as long as the slowest; ZeRO-3's
    forward passes do too, but the trainer has no ZeRO-3. Where layers are split, their ranks wait for one another in
    the forward pass, and are slow together.

    Args:
        device: whose own clock measures the forward pass where it runs on after the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps = -1  # in the first step kernels are compiled
        self._since = self._begin = time.perf_counter()
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """The rank begins to read a step's data."""
        self._begin = time.perf_counter()

    @contextmanager
    def forward(self, *, first: bool) -> Iterator[None]:
        """Around a forward pass; only a step's first is measured."""
        if not first:
            yield
        elif self._device.type == "cpu":
            yield
            self._seconds += time.perf_counter() - self._begin
        else:
            self._seconds += time.perf_counter() - self._begin
            start, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))

    def end(self, step: int) -> str | None:
        """Call it on all ranks after each step, when the device has done it: in some of them it is a collective.

        Returns:
            A line that names the slow ranks of the last STEPS steps, the slowest first; None without any.
        """
        self._steps += 1
        line = None
        if self._steps == STEPS and dist.get_world_size() > 1:
            taken = together(self._taken, failing="cannot compare the ranks' pace")
            known = [Taken(*each) for each in taken if each is not None]
            if len(known) == len(taken):
                line = slow_ranks(known, step=step)
        if self._steps in (0, STEPS):
            self._steps, self._seconds, self._since = 0, 0.0, time.perf_counter()
            self._events.clear()
        return line

    def _taken(self) -> list[Any] | None:
        """`Taken`; None where the device's clock fails: no run may end of that."""
        try:
            seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        except RuntimeError:
            return None
        return [socket.gethostname(), seconds / STEPS, (time.perf_counter() - self._since) / STEPS]


def slow_ranks(taken: Sequence[Taken], *, step: int) -> str | None:
    """The line about slow ranks; None without any.

    Args:
        taken: by rank.
        step: the last of the STEPS that it is of.
    """
    usual, whole = median_low(each.seconds for each in taken), taken[0].step
    slow = [
        (each.seconds, rank, each.host)
        for rank, each in enumerate(taken)
        if each.seconds > SLOW * usual and each.seconds - usual > FELT * whole
    ]
    if not slow:
        return None
    slow.sort(reverse=True)
    steps = f"{step - STEPS + 1} to {step}"
    names = [f"rank {rank} on {host} ({seconds * 1000:.0f} ms)" for seconds, rank, host in slow[:NAMED]]
    more = [f"{len(slow) - NAMED} more"] if len(slow) > NAMED else []
    return (
        f" slow, and all others wait: {', '.join([*names, *more])}; the median rank takes {usual * 1000:.0f} ms to "
        f"read its first micro-batch and go forward, of {whole * 1000:.0f} ms a step (means of steps {steps})"
    )
