# SPDX-License-Identifier: Apache-2.0
"""Times two sides that take turns, so that whatever else the machine does meets both alike."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from sides import PARTS, Side

WARM_UP_STEPS = 2


def take_turns(sides: dict[str, Side], *, blocks: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side's blocks of whole steps. A collective.

    A pair of blocks is one of each side. Every other pair runs in reverse order, so that a drift favours neither.
    """
    for side in sides.values():
        _block_seconds(side, steps=WARM_UP_STEPS, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(blocks):
        for name in sides if block % 2 == 0 else reversed(sides):
            seconds[name].append(_block_seconds(sides[name], steps=steps, device=device))
        if dist.get_rank() == 0:
            spent = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
            print(f"pair {block + 1} of {blocks}: {spent}", flush=True)
    return seconds


def part_seconds(side: Side, *, steps: int, device: torch.device) -> dict[str, float]:
    """This rank's seconds a step in each of PARTS, and in the rest: data, flags, bookkeeping. A collective.

    It waits for the GPU around each part, which costs time: call it after the blocks that count.
    """
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _synchronize(device)
            start = perf_counter()
            result = method(*args, **kwargs)
            _synchronize(device)
            spent[part] += perf_counter() - start
            return result

        return call

    for part in PARTS:
        setattr(side.parts, part, timed(part, getattr(side.parts, part)))
    total = _block_seconds(side, steps=steps, device=device)
    spent["rest"] = total - sum(spent.values())
    return {part: seconds / steps for part, seconds in spent.items()}


def _block_seconds(side: Side, *, steps: int, device: torch.device) -> float:
    """Wall time of whole steps, until the slowest rank is done."""
    _synchronize(device)
    dist.barrier()
    start = perf_counter()
    for _ in range(steps):
        side.train_step()
    _synchronize(device)
    dist.barrier()
    return perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
