# SPDX-License-Identifier: Apache-2.0
"""A small engine, its checkpoints and ways to damage them, for the tests of checkpoints."""

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

from merit_ds.training.checkpoint import save_checkpoint
from merit_ds.training.manifest import MANIFEST

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
WEIGHTS = "mp_rank_00_model_states.pt"
DAMAGES = [(SHARD, "missing"), (SHARD, "truncated"), (SHARD, "flipped bit"), (WEIGHTS, "flipped bit")]
DAMAGES += [(MANIFEST, "flipped bit"), (MANIFEST, "missing")]
MODEL = {"hidden_size": 17, "num_layers": 2}


def build(
    *, stage: int = 2, bf16: bool = False, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, seed: int = 0
) -> Any:
    """An engine over 17-wide layers: ZeRO's shards cut matrices mid-row."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(17, 17), torch.nn.Linear(17, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
    }
    trained = optimizer(model.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=trained, config=config)[0]


def train(engine: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(1000 * step + torch.distributed.get_rank())
        engine.backward(engine(torch.randn(2, 17)).square().mean())
        engine.step()


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in engine.module.parameters()])


def save(engine: Any, folder: Path, step: int, *, keep: int = 2) -> Path:
    return save_checkpoint(engine, folder, step=step, model=MODEL, client_state={"tokens": 10 * step}, keep=keep)


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
