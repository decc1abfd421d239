# SPDX-License-Identifier: Apache-2.0
"""Special values across ranks: float MAX in gloo drops a NaN that one rank alone holds."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from oracle import GROUP
from ranks import run_ranks

from merit_ds.collectives import MaxExchange, SumExchange
from merit_ds.errors import UnsupportedError
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.ops import select_kernel
from merit_ds.ops.merit_rule import MERIT
from merit_ds.ops.table import Operands
from merit_ds.reference import merit_step
from merit_ds.shard import Shard
from merit_ds.step import Stepper
from merit_ds.work import Work

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
    maxima = torch.tensor([[row[rank], row[1 - rank]] for row in VALUES])
    exchange = MaxExchange(maxima, group=dist.group.WORLD)
    exchange.start()
    exchange.wait()
    exchange.wait()
    return maxima


def test_maxima_are_exact_and_keep_nan():
    wanted = torch.tensor([[row[2]] * 2 for row in VALUES])
    for maxima in run_ranks(2, _exchange):
        torch.testing.assert_close(maxima, wanted, rtol=0, atol=0, equal_nan=True)


SPECIAL = (0.0, -0.0, TINY, -1e-40, 1e-38, 3e38, math.inf, -math.inf, math.nan)
MOMENTS = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
SETTINGS = GROUP | {"decay_vectors": True}


def random_case(seed, world):
    """A buffer of matrices and vectors, cut anywhere, with special values in weights, gradients and moments."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    matrices, start = [], 0
    for _ in range(integer(1, 3)):
        rows, cols = integer(1, 6), integer(1, 7)
        vector = integer(0, 3) == 0
        matrices.append(Matrix(start, 1, rows * cols, is_vector=True) if vector else Matrix(start, rows, cols))
        start += rows * cols
    bounds = [0, *sorted(integer(0, start) for _ in range(world - 1)), start]
    buffers = torch.randn(4, start, generator=draw)
    buffers[3].abs_()
    for _ in range(integer(0, 6)):
        buffers[integer(0, 2), integer(0, start - 1)] = SPECIAL[integer(0, len(SPECIAL) - 1)]
    if integer(0, 4) == 0:
        buffers[:, : start // 2] = 0
    eps = (1e-6, 0.0)[integer(0, 1)]
    return matrices, bounds, buffers, eps


def _step_all(rank, cases):
    world = dist.get_world_size()
    for seed in range(cases):
        matrices, bounds, buffers, eps = random_case(seed, world)
        weight, grad, m, v = (part[bounds[rank] : bounds[rank + 1]].clone() for part in buffers)
        layout = ShardLayout.build(matrices, bounds=bounds, rank=rank)
        shard = Shard(weight, layout, tuple(matrices), wrapper="none", group=dist.group.WORLD)
        kernel = select_kernel(weight.device, fused=[None, False][seed // 2 % 2])
        stepper = Stepper([shard], groups=[0], kernel=kernel, device=weight.device)
        stepper.step(Operands([weight], [grad], [m], [v]), [SETTINGS | {"eps": eps}], check_agreement=seed % 2 == 0)
        for matrix in matrices:
            shape = (matrix.cols,) if matrix.is_vector else (matrix.rows, matrix.cols)
            whole = [part[matrix.start : matrix.stop].view(shape) for part in buffers]
            merit_step(*whole, **MOMENTS, eps=eps)
        for ours, part in zip((weight, m, v), buffers[[0, 2, 3]], strict=True):
            expected = part[bounds[rank] : bounds[rank + 1]]
            same = (ours.view(torch.int32) == expected.view(torch.int32)) | (ours.isnan() & expected.isnan())
            assert same.all(), f"seed {seed}: {ours} is not {expected}"


def test_special_values_cross_the_ranks_as_they_cross_a_matrix():
    run_ranks(3, _step_all, 150)


def _without_a_kernel_on_one_rank(rank, folder):
    if rank == 1:
        os.environ.update(CXX="/nonexistent/c++", TORCH_EXTENSIONS_DIR=folder)
    matrix = Matrix(0, 4, 4)
    layout = ShardLayout.build([matrix], bounds=[0, 7, 16], rank=rank)
    weight = torch.ones(layout.cut[0].numel)
    work = Work([Shard(weight, layout, (matrix,), "none", group=dist.group.WORLD)], groups=[0], rule=MERIT, fused=True)
    operands = work.gather([torch.ones_like(weight)], [{name: torch.zeros_like(weight) for name in MERIT.moments}])
    with pytest.raises(UnsupportedError) as refusal:
        work.step(operands, [SETTINGS], noop=None, check_agreement=True)
    assert bool((weight == 1).all())
    return str(refusal.value)


def test_a_rank_that_cannot_build_the_kernel_it_must_have_tells_the_others(tmp_path):
    other, refusing = run_ranks(2, _without_a_kernel_on_one_rank, str(tmp_path))
    assert "fused=True" in refusing and "CXX" in refusing
    assert "another rank refuses" in other


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 4])
def test_thousands_of_random_layouts(world):
    run_ranks(world, _step_all, 2000)


def _sums(rank):
    """Parts whose sum depends on the order: rank 1's and 2's cancel before or after rank 0's is lost in them."""
    parts = torch.tensor([[1.0], [2.0**60], [-(2.0**60)]], dtype=torch.float64)[rank].repeat(3, 2)
    exchange = SumExchange(parts, group=dist.group.WORLD)
    exchange.start()
    exchange.wait()
    exchange.wait()
    return parts


def test_sums_are_taken_in_the_order_of_the_ranks():
    wanted = torch.full((3, 2), (1.0 + 2.0**60) - 2.0**60, dtype=torch.float64)
    assert float(wanted[0, 0]) == 0.0  # and 1 in another order
    for total in run_ranks(3, _sums):
        assert torch.equal(total, wanted)
