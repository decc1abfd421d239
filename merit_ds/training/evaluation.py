# SPDX-License-Identifier: Apache-2.0
"""The validation loss."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from merit_ds.training.dataset import Sequences, micro_batches


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module,
    dataset: Sequences,
    *,
    sequences: int,
    micro_batch: int,
    device: torch.device,
    progress: Callable[[], None],
) -> float:
    """Mean loss a token over the first `sequences` of the validation set, in nats. A collective.

    Args:
        model: as `build_model` returns it; it is left in training mode.
        dataset: validation sequences, split over the data-parallel ranks, each counted once.
        micro_batch: sequences of one forward pass.
        progress: called before each; ranks may have unequal numbers of them.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of tokens
    batches = micro_batches(
        dataset,
        start=0,
        stop=sequences,
        micro_batch=micro_batch,
        rank=parallel_state.get_data_parallel_rank(),
        world=parallel_state.get_data_parallel_world_size(),
    )
    model.eval()
    for batch in batches:
        progress()
        batch = {key: value.to(device) for key, value in batch.items()}
        per_token = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        total += torch.stack([(per_token * batch["loss_mask"]).sum(), batch["loss_mask"].sum()]).double()
    model.train()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])
