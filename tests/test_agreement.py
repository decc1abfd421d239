# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other: every value comes back as it was, and a failure on one is a failure on all."""

import errno
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from merit_ds.errors import InputError, TransientError
from merit_ds.training.agreement import from_rank_zero, together

WORLD = 3
VALUES: list[list[Any]] = [
    [None, [], {"ä": [1.5, "→ \U0001f600"]}],
    ["", "x" * 100_000, "a\nb\x00\udc80"],
    [{}, -(2**63), [[], {"": None}, True]],
    [[], [], []],
]
"""What the three ranks return, case by case."""


class Unlike:
    """Equal to nothing that JSON gives back."""


NO_JSON: list[Any] = [(1, 2), {1: 2}, {"a": [(1,)]}, float("nan"), b"bytes", Unlike()]


def fail_if(failing: bool) -> str:
    if failing:
        raise OSError("kein Platz\n  für « 数据 »")
    return "fine"


def fail_with(error: Exception, failing: bool) -> None:
    if failing:
        raise error


def all_cases(rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # torch's own object collectives unpickle by this name.
        patch.setattr(dist.distributed_c10d, "_unpickler", None)
        for values in VALUES:
            assert together(lambda values=values: values[rank], failing="x") == values
            assert from_rank_zero(lambda values=values: values[rank], failing="x") == values[0]
        for failing in range(WORLD):
            line = f"cannot save: rank {failing}: kein Platz für « 数据 »"
            assert (
                refusal(lambda failing=failing: together(lambda: fail_if(rank == failing), failing="cannot save"))
                == line
            )
        full, denied = OSError(errno.ENOSPC, "full"), PermissionError("denied")
        for error, kind in ((full, TransientError), (denied, InputError)):
            with pytest.raises(InputError) as found:
                together(lambda error=error: fail_with(error, rank == 1), failing="cannot save")
            assert type(found.value) is kind
        several = refusal(lambda: together(lambda: fail_if(rank > 0), failing="cannot save"))
        assert several.startswith("cannot save: rank 1: ")
        called: list[int] = []
        assert from_rank_zero(lambda: called.append(rank), failing="x") is None
        assert called == ([0] if rank == 0 else [])
        assert refusal(lambda: from_rank_zero(lambda: fail_if(True), failing="cannot save")).startswith(
            "cannot save: rank 0: "
        )
        for value in NO_JSON:
            assert f"rank {WORLD - 1}: " in refusal(
                lambda value=value: together(lambda: value if rank == WORLD - 1 else 0, failing="x")
            )
        # After every failure the ranks are where they were before: in step.
        assert together(lambda: rank, failing="x") == list(range(WORLD))
    assert dist.get_backend() == "gloo"


def refusal(action: Any) -> str:
    with pytest.raises(InputError) as refused:
        action()
    return str(refused.value)


def test_values_come_back_as_they_were_and_failures_reach_every_rank() -> None:
    run_ranks(WORLD, all_cases, timeout=120)


def test_one_rank_alone() -> None:
    run_ranks(1, alone)


def alone(rank: int) -> None:
    assert together(lambda: {"a": [1]}, failing="x") == [{"a": [1]}]
    assert from_rank_zero(lambda: "b", failing="x") == "b"
    assert refusal(lambda: from_rank_zero(lambda: fail_if(True), failing="x")).startswith("x: rank 0: ")
