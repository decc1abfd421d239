# SPDX-License-Identifier: Apache-2.0
"""Merit under real DeepSpeed engines, on gloo ranks, equals the unsharded reference bit for bit, or is refused.

The cells answer to DeepSpeed's own unit tests, which train with Adam and look for errors, or at a loss in a tolerance:
empty partitions (v1/half_precision/test_bf16.py, TestZeroEmptyPartition), reduce_scatter off (TestZero2ReduceScatterOff
there), parameters without a gradient (TestZeroEmptyGrad), clipping (runtime/zero/test_zero_grad_clip.py), overflow
(runtime/half_precision/test_zero_optim_overflow.py), torch_autocast (runtime/zero/test_zero_autocast.py), offload
with accumulation (v1/zero/test_zero_cpu_offload_grad_accum.py).
"""

from importlib.metadata import version
from itertools import chain

import pytest
from matrix import AXES, cells, pairs, pairwise, refusal, trains
from matrix_cases import check_cells
from ranks import run_ranks
from sharding_table import DOCUMENT, document, pinned_versions


@pytest.mark.parametrize("ranks", sorted(AXES["ranks"]))
def test_pairwise_cells(ranks):
    """At 2 ranks also every cell of the table that is refused: by whom, and why it says."""
    refused = [cell for cell in cells(2) if refusal(cell)] if ranks == 2 else []
    run_ranks(ranks, check_cells, refused + [cell for cell in pairwise() if cell["ranks"] == ranks])


def test_pairwise_cells_hold_every_pair_of_the_table_that_trains():
    covered = set(chain.from_iterable(pairs(cell) for cell in pairwise()))
    trained = [cell for ranks in AXES["ranks"] for cell in cells(ranks) if trains(cell)]
    assert set(chain.from_iterable(pairs(cell) for cell in trained)) <= covered


def test_the_table_is_the_matrix():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run make test-full: it writes the table"


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_cell_and_write_the_table():
    installed = {name: version(name).split("+")[0] for name in pinned_versions()}
    assert installed == pinned_versions(), "the table would name versions that it does not come from"
    for ranks in sorted(AXES["ranks"]):
        run_ranks(ranks, check_cells, [*cells(ranks), *(cell | {"ranks": ranks} for cell in pairwise())], timeout=1800)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
