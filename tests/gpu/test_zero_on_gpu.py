# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed engines on all GPUs of a machine, over NCCL: Merit's steps equal their unsharded replay, bit for bit.

The cells and what holds them are those of tests/test_matrix.py, which runs them on gloo ranks.
"""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from matrix import BF16, OFFLOAD, PRECISIONS, STAGES, Cell, cell_of
from matrix_cases import check_cells
from ranks import run_ranks

OVERLAP = "zero_optimization.overlap_comm"
"""DeepSpeed then averages gradients on a stream of its own, and Merit's kernels must wait for it."""
PINNED = {"device": "cpu", "pin_memory": True}
"""DeepSpeed then copies gradients to the host without waiting, and Merit's kernel there must not come too early."""
CELLS = {
    **{f"stage {stage}": [{"wrapper": (stage, precision)} for precision in PRECISIONS] for stage in STAGES},
    "overlapped": [{"wrapper": (stage, BF16), OVERLAP: True} for stage in (1, 2)],
    "offloaded": [{"wrapper": (stage, BF16), OFFLOAD: PINNED} for stage in (1, 2)],
}


def check_on_gpu(rank: int, cells: list[Cell]) -> None:
    """A rank's part. Nothing but the compiled kernels will do, so that a missing compiler is a failure."""
    assert get_accelerator().device_name() == "cuda"
    check_cells(rank, cells, {"fused": True})


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_every_step_is_the_unsharded_one(cells):
    world = torch.cuda.device_count()
    run_ranks(world, check_on_gpu, [cell_of(settings | {"ranks": world}) for settings in cells], device="cuda")
