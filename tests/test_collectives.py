# SPDX-License-Identifier: Apache-2.0
"""The MAX over ranks on special values: float MAX in gloo drops a NaN that one rank alone holds."""

import math

import torch
import torch.distributed as dist
from ranks import run_ranks

from merit_ds.collectives import MaxExchange

TINY = 2.0**-149
# rank 0's value, rank 1's, the maximum
VALUES = [
    (0.0, math.nan, math.nan),
    (math.nan, math.inf, math.nan),
    (math.copysign(math.nan, -1), 1.0, math.nan),
    (1.0, math.inf, math.inf),
    (TINY, 0.0, TINY),
    (1.0, 1.0 + 2**-23, 1.0 + 2**-23),
    (0.0, 0.0, 0.0),
]


def _exchange(rank):
    exchange = MaxExchange(len(VALUES), device=torch.device("cpu"), group=dist.group.WORLD)
    exchange.maxima[0] = torch.tensor([row[rank] for row in VALUES])
    exchange.maxima[1] = torch.tensor([row[1 - rank] for row in VALUES])
    exchange.start()
    exchange.wait()
    exchange.wait()
    return exchange.maxima


def test_maxima_are_exact_and_keep_nan():
    wanted = torch.tensor([[row[2] for row in VALUES]] * 2)
    for maxima in run_ranks(2, _exchange):
        torch.testing.assert_close(maxima, wanted, rtol=0, atol=0, equal_nan=True)
