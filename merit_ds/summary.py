# SPDX-License-Identifier: Apache-2.0
"""The line at start-up that says what Merit found: which rule for how many weights, which wrapper, which kernel.

A second line warns where the settings look like Adam's.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from merit_ds.log import user_logger
from merit_ds.ops import kernel_name
from merit_ds.shard import Shard


def log_summary(groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]], *, fused: bool | None) -> None:
    """Log the summary of all groups as INFO of the logger `merit_ds`, and what looks wrong as WARNING, on rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    logger = user_logger()
    logger.info(summary(groups, fused=fused))
    suspicion = adam_like([settings for settings, _ in groups])
    if suspicion is not None:
        logger.warning(suspicion)


def summary(groups: Sequence[tuple[dict[str, Any], Sequence[Shard]]], *, fused: bool | None) -> str:
    """One line, for instance for a user to see that no weight was forgotten.

    Args:
        groups: each group's settings with its shards.
        fused: the optimizer's setting.
    """
    shards = [shard for _, found in groups for shard in found if shard.tensor.requires_grad]
    matrices = [matrix for shard in shards for matrix in shard.matrices]
    vectors = [matrix for matrix in matrices if matrix.is_vector and matrix.scaled]
    unscaled = [matrix for matrix in matrices if not matrix.scaled]
    elements = sum(matrix.numel for matrix in matrices)
    settings = "; ".join(
        f"lr {group['lr']:g}, betas {tuple(group['betas'])}, eps {group['eps']:g}, clip {group['clip']}, weight_decay "
        f"{group['weight_decay']:g} ({'all' if group['decay_vectors'] else 'matrices only'})"
        for group, _ in groups
    )
    kernels = {kernel_name(shard.tensor.device, fused=fused) for shard in shards}
    cut = sum(len(shard.layout.cut) for shard in shards)
    slots = sum(shard.layout.exchange_size for shard in shards if shard.group is not None)
    slots += sum(shard.layout.tensor_exchange_size for shard in shards if shard.tensor_group is not None)
    return (
        f"Merit: {len(matrices) - len(vectors) - len(unscaled)} matrices by row, column and whole-weight ratio, "
        f"{len(vectors)} vectors by whole-weight ratio{f', {len(unscaled)} without a ratio' if unscaled else ''} "
        f"({elements:,} elements); wrapper {' '.join(sorted({s.wrapper for s in shards}))}; "
        f"{cut} weights of this rank cut, {8 * slots:,} bytes of maxima a step; "
        f"kernel {' '.join(sorted(kernels))}; {settings}"
    )


def adam_like(groups: Sequence[dict[str, Any]]) -> str | None:
    """One line on a group's settings that look like Adam's defaults, or None.

    Hugging Face fills "auto" with Adam's lr 5e-5, beta2 0.999, eps 1e-8 and no decay. Any one of the first three may be
    meant, so at least two must be there; the decay, which is often left out on purpose, is only named beside them.
    """
    for group in groups:
        marks = [
            (0 < group["lr"] <= 1e-4, f"lr {group['lr']:g} (published: 6e-3 to 1e-2)"),
            (group["betas"][1] == 0.999, "beta2 0.999 (0.95)"),
            (group["eps"] == 1e-8, "eps 1e-8 (1e-6)"),
        ]
        found = [text for holds, text in marks if holds]
        if len(found) < 2:
            continue
        if all(other["weight_decay"] == 0 for other in groups):
            found.append("weight_decay 0 (0.1)")
        return (
            f"Merit: {', '.join(found)} look like Adam's defaults, as \"auto\" fills them in; MERIT's are in brackets. "
            "Set them in optimizer.params, or by Hugging Face's learning_rate, adam_beta2, adam_epsilon, weight_decay"
        )
    return None
