# SPDX-License-Identifier: Apache-2.0
"""Decisions that every rank must take alike: small collectives over the default process group.

A rank that stops alone, for a signal, a full disk or a NaN that only it saw, leaves the others waiting in their next
collective until its timeout, half an hour by default.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from merit_ds.errors import InputError

Result = TypeVar("Result")


class Agreement:
    """The largest value of each flag over all ranks, on its way: one int32 MAX all-reduce.

    Made before a piece of work and read after it, it costs no rank the delay of the slowest in that piece.

    Args:
        flags: as many on every rank, each within int32; 0 means "nothing to report".
        device: where the group's backend can reduce; `engine.device` fits.
    """

    def __init__(self, flags: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self._values = torch.tensor(list(flags), dtype=torch.int32, device=device)
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, async_op=True)

    def result(self) -> list[int]:
        """Wait for the slowest rank, and return the agreed flags."""
        self._work.wait()
        return [int(value) for value in self._values.tolist()]


def agree(flags: Sequence[int], *, device: torch.device | str = "cpu") -> list[int]:
    """An `Agreement`'s result at once."""
    return Agreement(flags, device=device).result()


def together(action: Callable[[], Result], *, failing: str) -> list[Result]:
    """Run `action` on every rank; where it fails on one, fail on all.

    Args:
        action: must hold no collective that it could leave half-way.
        failing: begins the error's line, for instance "cannot save the checkpoint".

    Returns:
        What each rank's action returned, in rank order (it is pickled on the way).

    Raises:
        InputError: on every rank alike, with the first failing rank's reason in one line.
    """
    cause: Exception | None = None
    outcome: tuple[Result | None, str | None]
    try:
        outcome = (action(), None)
    except Exception as error:
        cause = error
        outcome = (None, " ".join(str(error).split()) or type(error).__name__)
    outcomes: list[tuple[Result, str | None]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(outcomes, outcome)
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            raise InputError(f"{failing}: rank {rank}: {reason}") from cause
    return [result for result, _ in outcomes]


def from_rank_zero(action: Callable[[], Result], *, failing: str) -> Result:
    """What `action` returned on rank 0, which alone runs it; its failure there is raised on every rank.

    Raises:
        InputError: as `together`.
    """
    results = together(lambda: action() if dist.get_rank() == 0 else None, failing=failing)
    return results[0]  # type: ignore[return-value]
