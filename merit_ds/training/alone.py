# SPDX-License-Identifier: Apache-2.0
"""Megatron-core in this process alone: it needs a process group even for one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from merit_ds.training.model import initialise_megatron


@contextmanager
def megatron_alone() -> Iterator[None]:
    """A gloo group of one process with Megatron-core's groups on top; both are gone afterwards."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # in torch's documentation, but not in its __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        initialise_megatron(seed=1, device=torch.device("cpu"))
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
