# SPDX-License-Identifier: Apache-2.0
"""Names the ranks for which all others wait: a step takes as long as its slowest rank's."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from merit_ds.training.agreement import together

STEPS = 50
"""In each so many steps the ranks compare what they took."""
SLOW = 1.5
"""How many times the ranks' median is called slow."""
NAMED = 4
"""Ranks in a line; of more it says how many."""


class Pace:
    """How long this rank takes for what it waits for nobody in: its data and the first forward pass of each step.

    Backward passes hold collectives under ZeRO-1 and 2, in which a fast rank takes as long as the slowest. Where layers
    are split, their ranks wait for one another in the forward pass too, and are slow together.

    Args:
        device: whose own clock measures the forward pass where it runs on after the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps = -1  # in the first step kernels are compiled
        self._begin = self._seconds = 0.0
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
        if self._steps == STEPS:
            own = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
            taken = together(lambda: [socket.gethostname(), own / STEPS], failing="cannot compare the ranks' pace")
            line = slow_ranks([(host, seconds) for host, seconds in taken], step=step)
        if self._steps in (0, STEPS):
            self._steps, self._seconds = 0, 0.0
            self._events.clear()
        return line


def slow_ranks(taken: Sequence[tuple[str, float]], *, step: int) -> str | None:
    """The line about ranks that took more than SLOW times the median; None without any.

    Args:
        taken: host and seconds a step, of each rank.
        step: the last of the STEPS that these are of.
    """
    usual = median_low(seconds for _, seconds in taken)
    slow = sorted(((s, rank, host) for rank, (host, s) in enumerate(taken) if s > SLOW * usual), reverse=True)
    if not slow:
        return None
    names = [f"rank {rank} on {host} ({seconds * 1000:.0f} ms)" for seconds, rank, host in slow[:NAMED]]
    more = [f"{len(slow) - NAMED} more"] if len(slow) > NAMED else []
    return (
        f" slow, and all others wait: {', '.join([*names, *more])}; the median rank takes {usual * 1000:.0f} ms to "
        f"read its data and go forward, in steps {step - STEPS + 1} to {step}"
    )
