# SPDX-License-Identifier: Apache-2.0
"""Decisions that every rank must take alike: small collectives over the default process group.

A rank that stops alone, for a signal, a full disk or a NaN that only it saw, leaves the others waiting in their next
collective until its timeout, half an hour by default.

Results travel as JSON in byte tensors. torch's `all_gather_object` would unpickle what arrives, and whoever reaches the
sockets of a run, which authenticate nobody, could run code on every rank.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from merit_ds.collectives import collective_device
from merit_ds.errors import InputError, TransientError, is_transient

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
        action: must hold no collective that it could leave half-way. It returns what JSON gives back as it was: no
            tuples, and dictionaries with strings for keys.
        failing: begins the error's line, for instance "cannot save the checkpoint".

    Returns:
        What each rank's action returned, in rank order.

    Raises:
        InputError: on every rank alike, with the first failing rank's reason in one line; a TransientError where that
            rank's error was one, or the system's.
    """
    own, cause = _attempt(action)
    return [_result(text, rank, failing, cause) for rank, text in enumerate(_gather(own))]


def from_rank_zero(action: Callable[[], Result], *, failing: str) -> Result:
    """What `action` returned on rank 0, which alone runs it and waits for nobody; a failure is raised on every rank.

    Args:
        action: as for `together`.
        failing: as for `together`.

    Raises:
        InputError: as `together`.
    """
    text, cause = _attempt(action) if dist.get_rank() == 0 else ("", None)
    result: Result = _result(_broadcast(text), 0, failing, cause)
    return result


def _attempt(action: Callable[[], Any]) -> tuple[str, Exception | None]:
    """The action's result or the reason of its failure, as JSON, and that failure."""
    try:
        result = action()
        text = json.dumps({"result": result})
        if json.loads(text)["result"] != result:
            raise TypeError(f"{type(result).__name__} with a part that JSON does not give back as it was")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return json.dumps({"reason": reason, "transient": is_transient(error)}), error
    return text, None


def _result(text: str, rank: int, failing: str, cause: Exception | None) -> Any:
    outcome = json.loads(text)
    if "reason" in outcome:
        kind = TransientError if outcome["transient"] else InputError
        raise kind(f"{failing}: rank {rank}: {outcome['reason']}") from cause
    return outcome["result"]


def _gather(text: str) -> list[str]:
    """Every rank's ASCII text, in rank order."""
    own = _to_tensor(text)
    sizes = [own.new_empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own.numel()], device=own.device))
    numbers = [int(size) for size in sizes]
    padded = own.new_zeros(max(numbers))
    padded[: own.numel()] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [_to_text(part[:number]) for part, number in zip(parts, numbers, strict=True)]


def _broadcast(text: str) -> str:
    """Rank 0's ASCII text."""
    own = _to_tensor(text)
    size = torch.tensor([own.numel()], device=own.device)
    dist.broadcast(size, src=0)
    content = own if dist.get_rank() == 0 else own.new_empty(int(size))
    dist.broadcast(content, src=0)
    return _to_text(content)


def _to_tensor(text: str) -> torch.Tensor:
    """uint8 [length], where the process group's backend can send it."""
    device = collective_device(None, torch.device("cpu"))
    return torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=device)


def _to_text(content: torch.Tensor) -> str:
    return bytes(content.tolist()).decode("ascii")
