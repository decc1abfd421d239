# SPDX-License-Identifier: Apache-2.0
"""A run on paper: recipe, DeepSpeed JSON and ranks held against each other, before anything heavy is imported."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merit_ds.errors import InputError
from merit_ds.training.config import Config, ModelConfig, RunConfig
from merit_ds.training.deepspeed_config import (
    model_dtype,
    optimizer_type,
    place_monitors,
    quiet_timer,
    read_deepspeed_json,
    section,
)
from merit_ds.training.schedule import Batch, check_scheduler, plan_batch, total_steps


@dataclass(frozen=True)
class Plan:
    """A run that adds up: the recipe, DeepSpeed's JSON, and what follows from both."""

    config: Config
    ds_config: dict[str, Any]
    batch: Batch
    steps: int
    rank: int
    world: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        """This rank's, as DeepSpeed names it."""
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().device_name(self.local_rank))


def make_plan(config: Config) -> Plan:
    """Check the recipe against the JSON and this launch's ranks, before anything is built.

    Raises:
        InputError: something does not fit.
    """
    _refuse_unranked()
    return plan_of(
        config,
        read_deepspeed_json(Path(config.run.deepspeed)),
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def plan_of(config: Config, ds_config: dict[str, Any], *, world: int, rank: int = 0, local_rank: int = 0) -> Plan:
    """The plan of a launch of `world` ranks, as one of them has it.

    Args:
        ds_config: as `read_deepspeed_json` returns it.

    Raises:
        InputError: something does not fit.
    """
    ds_config = quiet_timer(place_monitors(ds_config, config.run.save))
    _check_tensor_parallel(config.model, ds_config, ranks=world)
    if optimizer_type(ds_config) == "muon":
        _check_muon(config.model, ds_config)
    batch = plan_batch(ds_config, ranks=world // config.model.tensor_parallel)
    steps = total_steps(config.run.train_tokens, batch=batch.global_batch, seq_length=config.model.seq_length)
    check_scheduler(ds_config, steps=steps)
    return Plan(
        config=config, ds_config=ds_config, batch=batch, steps=steps, rank=rank, world=world, local_rank=local_rank
    )


def _refuse_unranked() -> None:
    """Several processes that each take themselves for the only one would overwrite one another's files."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(name, "1")) > 1 and "RANK" not in os.environ:
            raise InputError(
                f"{name} is {os.environ[name]}, but RANK and WORLD_SIZE are not set: start by deepspeed or torchrun, "
                "or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
            )


def _check_tensor_parallel(model: ModelConfig, ds_config: dict[str, Any], *, ranks: int) -> None:
    size = model.tensor_parallel
    if section(ds_config, "tensor_parallel"):
        raise InputError(
            "tensor_parallel in the DeepSpeed JSON is DeepSpeed's own splitting, which does not know Megatron-core's "
            "layers: set model.tensor_parallel in the recipe"
        )
    if ranks % size:
        raise InputError(f"model.tensor_parallel {size} does not divide the {ranks} ranks")
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    if size > 1 and stage == 0 and model_dtype(ds_config) != torch.float32:
        # It takes the split weights of the first tensor-parallel rank for all, and clips by that.
        raise InputError(
            "zero_optimization.stage 0 with bf16 or fp16 under model.tensor_parallel: DeepSpeed's gradient norm is "
            "wrong there; set the stage to 1 or 2"
        )


def _check_muon(model: ModelConfig, ds_config: dict[str, Any]) -> None:
    """DeepSpeed's own Muon, where it is Muon: seen in 0.19.8, `tests/test_muon.py`.

    It gives Muon the matrices whose names have neither "embed" nor "lm_head" in them, and the rest to Adam.
    DeepSpeedZeroOptimizer, which ZeRO 1 and 2 get, orthogonalises before it takes the norm; BF16_Optimizer after.
    """
    if model.tensor_parallel > 1:
        raise InputError(
            "model.tensor_parallel above 1 with Muon: DeepSpeed would orthogonalise each rank's part of a matrix by "
            "itself; set it to 1"
        )
    if not model.tied_embeddings:
        raise InputError(
            "model.tied_embeddings false with Muon: DeepSpeed would orthogonalise the output layer, its Adam's; "
            "set it to true"
        )
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    offload = section(ds_config, "zero_optimization").get("offload_optimizer")
    sums = section(ds_config, "data_types").get("grad_accum_dtype")
    clips_first = stage == 0 or (
        stage == 1 and not offload and sums == "fp32" and model_dtype(ds_config) == torch.bfloat16
    )
    if not clips_first and ds_config.get("gradient_clipping", 1.0) != 0:
        raise InputError(
            f"gradient_clipping with Muon under ZeRO stage {stage}: DeepSpeed would clip the update, not the gradient; "
            "set gradient_clipping to 0, or use bf16, stage 1 and data_types.grad_accum_dtype fp32"
        )


def local_ranks() -> int:
    """Ranks of this host: deepspeed says it in one variable, torchrun in another; 1 where nobody says it."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def continues_itself(run: RunConfig) -> bool:
    """Whether a run loads from the folder that it saves to."""
    return bool(run.save and run.load) and Path(str(run.save)).resolve() == Path(str(run.load)).resolve()
