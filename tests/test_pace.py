# SPDX-License-Identifier: Apache-2.0
"""What a rank takes without waiting for others, compared over real ranks."""

import socket
import time

import pytest
import torch
from ranks import run_ranks

from merit_ds.training import pace
from merit_ds.training.pace import STEPS, Pace, slow_ranks


def _train(rank, *, slow_data, slow_forward, slow_later):
    """The lines of 2 * STEPS + 1 steps of two micro-batches; each rank takes longer than the one before it."""
    own = Pace(torch.device("cpu"))
    lines = []
    for step in range(1, 2 * STEPS + 2):
        factor = rank if step > 1 else 5 * (2 - rank)  # rank 0's first step is the slowest
        own.begin()
        time.sleep(0.002 + factor * slow_data)
        for index in range(2):
            with own.forward(first=index == 0):
                time.sleep(0.002 + factor * slow_forward if index == 0 else factor * slow_later)
            torch.distributed.barrier()
        if line := own.end(step):
            lines.append(line)
    return lines


def _cases(rank):
    quick = {"slow_data": 0, "slow_forward": 0, "slow_later": 0}
    return {name: _train(rank, **quick | {name: 0.01}) for name in ("slow_data", "slow_forward", "slow_later")}


def test_the_rank_that_takes_long_is_named_on_every_rank():
    by_rank = run_ranks(3, _cases)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    begin = f" slow, and all others wait: rank 2 on {socket.gethostname()} ("
    for name in ("slow_data", "slow_forward"):
        lines = by_rank[0][name]
        assert len(lines) == 2 and all(line.startswith(begin) for line in lines), lines
        assert lines[1].endswith(f"in steps {STEPS + 2} to {2 * STEPS + 1}")
    assert by_rank[0]["slow_later"] == []  # what holds no rank up in its own forward pass is not measured


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([0.2], None),
        ([0.2, 0.29], None),
        ([0.2, 0.31], "rank 1 on h1 (310 ms); the median rank takes 200 ms"),
        ([0.5, 0.2, 0.1, 0.1], "rank 0 on h0 (500 ms), rank 1 on h1 (200 ms); the median rank takes 100 ms"),
        ([1.0, 0.2, *[0.1] * 9, *[0.3] * 5], "rank 0 on h0 (1000 ms), rank 15 on h15 (300 ms), rank 14"),
        ([1.0, 0.2, *[0.1] * 9, *[0.3] * 5], "rank 13 on h13 (300 ms), 3 more; the median rank takes 100 ms"),
    ],
)
def test_the_slowest_come_first_and_the_rest_is_counted(seconds, named):
    line = slow_ranks([(f"h{rank}", each) for rank, each in enumerate(seconds)], step=60)
    assert line is None if named is None else named in line
    assert pace.NAMED == 4
