# SPDX-License-Identifier: Apache-2.0
"""The operations: tables, the choice of a kernel, what is refused, and that all kernels give the same bits."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import GROUP

from merit_ds import UnsupportedError
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.ops import select_kernel
from merit_ds.ops.table import Operands, Tile, cut_tiles, scalars_of, tabulate
from merit_ds.phases import Plan
from merit_ds.reference import merit_step
from merit_ds.shard import Shard

CPU = torch.device("cpu")
SETTINGS = {name: GROUP[name] for name in ("lr", "betas", "eps", "weight_decay")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows, cols, *, weight=torch.float32, grad=torch.float32):
    draw = torch.Generator().manual_seed(rows * cols)
    w, g, m, v = torch.randn(4, rows, cols, generator=draw)
    return Operands([w.to(weight)], [g.to(grad)], [m], [v.abs()])


def arguments(rows, cols):
    """Tables for one whole matrix."""
    tiles = tabulate([Tile(0, 0, cols, rows, cols, row_slot=1 + cols, col_slot=1, whole_slot=0, hyper=0)])
    return {"tiles": tiles, "scalars": torch.tensor(scalars_of(GROUP)), "maxima": torch.zeros(1 + rows + cols, 2)}


def elements(tiles):
    """(position in the tensor, slot of its row, slot of its column) of each element."""
    return [
        (
            tile.offset + row * tile.pitch + col,
            tile.row_slot + row if tile.row_slot >= 0 else -1,
            tile.col_slot + col if tile.col_slot >= 0 else -1,
        )
        for tile in tiles
        for row in range(tile.rows)
        for col in range(tile.cols)
    ]


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 30)),
    offset=st.integers(0, 9),
    vector=st.booleans(),
    rows=st.integers(1, 5),
    span=st.sampled_from([4, 8, 16]),
)
def test_cut_tiles_cover_every_element_once_and_begin_where_reads_are_aligned(shape, offset, vector, rows, span):
    size = (1, shape[0] * shape[1]) if vector else shape
    whole = Tile(0, offset, size[1], *size, *((-1, -1) if vector else (50, 100)), whole_slot=0, hyper=2)
    tiles = cut_tiles([whole], rows=rows, span=span)
    assert sorted(elements(tiles)) == sorted(elements([whole]))
    for tile in tiles:
        limit = rows * span if vector else span
        assert tile.rows <= rows and tile.cols + tile.offset % 4 <= limit
        assert tile.pitch == whole.pitch and (tile.tensor, tile.whole_slot, tile.hyper) == (0, 0, 2)
        first_col = (tile.offset - offset) % whole.pitch
        assert first_col == 0 or (first_col + offset) % 4 == 0 or (whole.pitch % 4 and whole.rows > 1)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("grad", DTYPES)
def test_fused_is_eager_for_every_dtype(weight, grad):
    fused, eager = (operands(37, 53, weight=weight, grad=grad) for _ in range(2))
    for tensors, kernel in ((fused, select_kernel(CPU, fused=True)), (eager, select_kernel(CPU, fused=False))):
        kernel.step(kernel.preparer([37 * 53], CPU)(tensors), **arguments(37, 53))
    for ours, theirs in zip(fused, eager, strict=True):
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("shape", [(150, 301), (3, 1024), (200, 1), (9001,), (1, 500)])
@pytest.mark.parametrize("slices", [[0, 1], [0, 0.3, 0.31, 1]])
def test_emulated_cuda_takes_the_tables_that_it_is_given(emulated_cuda, shape, slices):
    """Whole and cut, with the package's own plan and tiles; the ranks' maxima are reduced by hand."""
    matrix = Matrix(0, *shape) if len(shape) == 2 else Matrix(0, 1, *shape, is_vector=True)
    bounds = [int(part * matrix.numel) for part in slices]
    draw = torch.randn(4, matrix.numel, generator=torch.Generator().manual_seed(matrix.numel))
    draw[3].abs_()
    w, g, m, v = (part.clone().view(shape) for part in draw)
    merit_step(w, g, m, v, **SETTINGS)
    ranks = []
    for rank, (begin, end) in enumerate(itertools.pairwise(bounds)):
        layout = ShardLayout.build([matrix], bounds=bounds, rank=rank)
        plan = Plan.build([Shard(draw[0], layout, (), wrapper="none", group="all")], groups=[0])
        prepare = emulated_cuda.preparer([end - begin], CPU)
        tensors = prepare(Operands(*([part[begin:end].clone()] for part in draw)))
        common = {
            "scalars": torch.tensor(scalars_of(GROUP | {"decay_vectors": True})),
            "maxima": torch.zeros(plan.slots, 2),
        }
        for tiles, operation in ((plan.cut, emulated_cuda.accumulate), (plan.alone, emulated_cuda.step)):
            operation(tensors, tiles=emulated_cuda.table(tiles, CPU), **common)
        ranks.append((plan, tensors, common))
    shared = [common["maxima"][plan.data[0].begin : plan.data[0].end] for plan, _, common in ranks]
    largest = torch.stack(shared).amax(0)
    for part, (plan, tensors, common) in zip(shared, ranks, strict=True):
        part.copy_(largest)
        emulated_cuda.apply(tensors, tiles=emulated_cuda.table(plan.cut, CPU), **common)
    for index, wanted in ((0, w), (2, m), (3, v)):
        ours = torch.cat([tensors.operands[index][0] for _, tensors, _ in ranks])
        assert torch.equal(ours.view(shape), wanted)


@pytest.mark.parametrize("name", ["accumulate", "apply", "step"])
def test_registered_operations_are_what_their_schema_says(name):
    operation = getattr(torch.ops.merit_ds, name).default
    found = torch.library.opcheck(operation, (*operands(6, 5), *arguments(6, 5).values()))
    assert set(found.values()) == {"SUCCESS"}


def test_registered_operations_step_a_matrix():
    tensors = operands(6, 5)
    w, g, m, v = (part[0].clone() for part in tensors)
    merit_step(w, g, m, v, **SETTINGS)
    torch.ops.merit_ds.step(*tensors, **arguments(6, 5))
    assert torch.equal(tensors.weights[0], w) and torch.equal(tensors.exp_avg_sqs[0], v)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"tensor": 1},
        {"tensor": -1},
        {"row_slot": 7},
        {"row_slot": -2},
        {"col_slot": 8},
        {"col_slot": -1},
        {"whole_slot": 12},
        {"whole_slot": -1},
        {"hyper": 3},
        {"rows": 0},
        {"pitch": 4},
        {"pitch": 6},
        {"offset": 2**63 - 1},
        {"row_slot": 2**63 - 2},
        {"hyper": 2**63 - 1},
        {"pitch": 2**62},
    ],
)
def test_a_table_that_reaches_beyond_its_memory_is_refused(change):
    with_fault = arguments(6, 5)
    tile = Tile(*with_fault["tiles"][0].tolist())
    with_fault["tiles"] = tabulate([tile._replace(**change)])
    with pytest.raises(ValueError, match="a row of tiles names"):
        torch.ops.merit_ds.step(*operands(6, 5), **with_fault)


def two_matrices():
    """Two of [4, 5], the first in two tiles; and their operands."""
    tiles = [Tile(0, 0, 5, 2, 5, row_slot=6, col_slot=1, whole_slot=0, hyper=0)]
    tiles.append(tiles[0].part(2, 0, rows=2, cols=5))
    tiles.append(Tile(1, 0, 5, 4, 5, row_slot=16, col_slot=11, whole_slot=10, hyper=0))
    first, second = operands(4, 5), operands(5, 4)
    both = Operands(*([a[0], b[0].view(4, 5)] for a, b in zip(first, second, strict=True)))
    return tiles, both, {"scalars": torch.tensor(scalars_of(GROUP)), "maxima": torch.zeros(20, 2)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)])
def test_tiles_of_a_matrix_that_are_apart_are_refused_where_the_order_counts(order):
    """The CPU kernel would change the first half of the weight by the maxima of that half alone."""
    tiles, tensors, rest = two_matrices()
    expected = [[part.clone() for part in column] for column in tensors]
    for w, g, m, v in zip(*expected, strict=True):
        merit_step(w, g, m, v, **SETTINGS)
    table = tabulate([tiles[number] for number in order])
    if order == (0, 2, 1):
        with pytest.raises(ValueError, match="merit_ds::step: the tiles of whole_slot 0 are apart"):
            torch.ops.merit_ds.step(*tensors, table, **rest)
        torch.ops.merit_ds.accumulate(*tensors, table, **rest)
        torch.ops.merit_ds.apply(*tensors, table, **rest)
    else:
        torch.ops.merit_ds.step(*tensors, table, **rest)
    assert all(map(torch.equal, tensors.weights, expected[0]))


def test_tiles_without_a_ratio_may_lie_anywhere():
    weights = []
    for order in ((0, 1, 2), (0, 2, 1)):
        tiles, tensors, rest = two_matrices()
        before = [weight.clone() for weight in tensors.weights]
        free = [tile._replace(row_slot=-1, col_slot=-1, whole_slot=-1) for tile in tiles[:2]] + tiles[2:]
        torch.ops.merit_ds.step(*tensors, tabulate([free[number] for number in order]), **rest)
        assert not any(map(torch.equal, tensors.weights, before))
        weights.append(tensors.weights)
    assert all(map(torch.equal, *weights))


def test_tensors_that_no_kernel_can_take_are_refused():
    w, g, m, v = (part[0] for part in operands(6, 6))
    for wrong in (
        Operands([w.t()], [g], [m], [v]),
        Operands([w], [g[:5]], [m], [v]),
        Operands([w], [g], [m.bfloat16()], [v]),
        Operands([w.double()], [g], [m], [v]),
        Operands([w], [g], [], [v]),
    ):
        with pytest.raises(ValueError, match="Merit: "):
            torch.ops.merit_ds.step(*wrong, **arguments(6, 6))


def test_no_fused_kernel_for_other_devices():
    with pytest.raises(UnsupportedError, match=r"fused=True.*no fused kernel for meta"):
        select_kernel(torch.device("meta"), fused=True)


SCRIPT = """
import logging, torch, merit_ds
weight = torch.nn.Parameter(torch.ones(3, 3))
weight.grad = torch.ones(3, 3)
for fused in (None, None, True):
    try:
        merit_ds.Merit([weight], lr=0.1, fused=fused).step()
    except merit_ds.UnsupportedError as error:
        print("refused:", error)
"""


def test_without_a_compiler_it_warns_once_and_refuses_on_request(tmp_path):
    environment = {"PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "several times slower" in line]
    assert len(warnings) == 1 and "CXX" in warnings[0], done.stdout
    assert "refused: Merit: fused=True, but" in done.stdout
    assert "kernel eager" in done.stdout
