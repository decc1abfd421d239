# SPDX-License-Identifier: Apache-2.0
"""The line at start-up that says what Merit found: which rule for how many weights, which wrapper, which kernel."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from merit_ds.shard import Shard

logger = logging.getLogger("merit_ds")


def log_summary(groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]]) -> None:
    """Log the summary of all groups as INFO of the logger `merit_ds`, on rank 0.

    A program that sets up logging decides what becomes of it. For all others it goes to stdout: DeepSpeed's own logger
    shows warnings only, and a user should see what Merit found.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stdout))
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.info(summary(groups))


def summary(groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]]) -> str:
    """One line, for instance for a user to see that no weight was forgotten.

    Args:
        groups: each group's settings with its shards.
    """
    shards = [shard for _, found in groups for shard in found if shard.tensor.requires_grad]
    matrices = [matrix for shard in shards for matrix in shard.matrices]
    vectors = [matrix for matrix in matrices if matrix.is_vector]
    elements = sum(matrix.rows * matrix.cols for matrix in matrices)
    settings = "; ".join(
        f"lr {group['lr']:g}, betas {tuple(group['betas'])}, eps {group['eps']:g}, clip {group['clip']}, weight_decay "
        f"{group['weight_decay']:g} ({'all' if group['decay_vectors'] else 'matrices only'})"
        for group, _ in groups
    )
    cut = sum(len(shard.layout.cut) for shard in shards)
    exchanged = sum(8 * shard.layout.exchange_size for shard in shards if shard.group is not None)
    return (
        f"Merit: {len(matrices) - len(vectors)} matrices by row, column and whole-weight ratio, {len(vectors)} vectors "
        f"by whole-weight ratio ({elements:,} elements); wrapper {' '.join(sorted({s.wrapper for s in shards}))}; "
        f"{cut} weights of this rank cut, {exchanged:,} bytes of maxima a step; kernel eager; {settings}"
    )
