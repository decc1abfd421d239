# SPDX-License-Identifier: Apache-2.0
"""What a rank takes without waiting for others, compared over real ranks."""

import socket
import time

import pytest
import torch
from ranks import run_ranks

from merit_ds.training.pace import STEPS, Pace, Taken, slow_ranks


def _train(rank, *, slow):
    """The lines of 2 * STEPS + 1 steps of two micro-batches; rank 2 is slow in something, rank 0 in its first step."""
    own = Pace(torch.device("cpu"))
    lines = []
    for step in range(1, 2 * STEPS + 2):
        extra = {slow: 0.03} if rank == (0 if step == 1 else 2) else {}
        own.begin()
        time.sleep(0.002 + extra.get("data", 0))
        for index in range(2):
            with own.forward(first=index == 0):
                time.sleep(0.01 + extra.get(("first", "second")[index], 0))
            torch.distributed.barrier()
        if line := own.end(step):
            lines.append(line)
    return lines


def _cases(rank):
    return {slow: _train(rank, slow=slow) for slow in ("data", "first", "second")}


def test_the_rank_that_takes_long_is_named_on_every_rank():
    by_rank = run_ranks(3, _cases)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    begin = f" slow, and all others wait: rank 2 on {socket.gethostname()} ("
    for slow in ("data", "first"):
        lines = by_rank[0][slow]
        assert len(lines) == 2 and all(line.startswith(begin) for line in lines), lines
        assert lines[1].endswith(f"(means of steps {STEPS + 2} to {2 * STEPS + 1})")
    assert by_rank[0]["second"] == []  # only a step's first micro-batch is measured


MANY = [1.0, 0.2, *[0.1] * 9, *[0.3] * 5]


@pytest.mark.parametrize(
    ("seconds", "step", "named"),
    [
        ([0.2, 0.29], 0.6, None),
        ([0.2, 0.31], 0.6, "rank 1 on h1 (310 ms); the median rank takes 200 ms"),
        ([0.2, 0.31], 2.3, None),  # 5 % of the step, which nobody feels
        ([0.5, 0.2, 0.1, 0.1], 1.0, "rank 0 on h0 (500 ms), rank 1 on h1 (200 ms); the median rank takes 100 ms"),
        (MANY, 2.0, "rank 0 on h0 (1000 ms), rank 15 on h15 (300 ms), rank 14"),
        (MANY, 2.0, "rank 13 on h13 (300 ms), 2 more; the median rank takes 100 ms"),
    ],
)
def test_the_slowest_come_first_and_the_rest_is_counted(seconds, step, named):
    line = slow_ranks([Taken(f"h{rank}", each, step) for rank, each in enumerate(seconds)], step=60)
    assert line is None if named is None else named in line


class Event:
    """In the place of a GPU's; its clock stands still, or fails."""

    failing = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        if self.failing:
            raise RuntimeError("not ready")
        return 40.0


def _on_a_gpu(rank):
    """Lines by what the clock does; a stand-in for the GPU's events, of which this machine has none."""
    from merit_ds.training import pace

    lines = {}
    for failing in (False, True):
        pace.get_accelerator = lambda failing=failing: type("", (), {"Event": type("", (Event,), {"failing": failing})})
        own = Pace(torch.device("cuda"))
        lines[failing] = []
        for step in range(1, STEPS + 2):
            own.begin()
            time.sleep(0.002)
            with own.forward(first=rank == 1):
                pass
            lines[failing].append(own.end(step))
    return lines


def test_a_gpus_clock_counts_and_its_failure_ends_nothing():
    for lines in run_ranks(2, _on_a_gpu):
        assert "rank 1" in lines[False][-1] and not any(lines[False][:-1])
        assert not any(lines[True])
