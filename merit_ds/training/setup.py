# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: check everything on paper, then processes, data, model, engine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError

import merit_ds  # noqa: F401  (registers the optimizer)
from merit_ds.errors import InputError
from merit_ds.training.agreement import together
from merit_ds.training.config import Config
from merit_ds.training.cpu_comm import check_stale_lock, release_shared_memory
from merit_ds.training.dataset import Sequences, open_datasets
from merit_ds.training.deepspeed_config import model_dtype, place_monitors, read_deepspeed_json, section
from merit_ds.training.model import build_model, initialise_megatron
from merit_ds.training.schedule import Batch, check_scheduler, plan_batch, total_steps
from merit_ds.training.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Plan:
    """A run that adds up: the recipe, DeepSpeed's JSON, and what follows from both."""

    config: Config
    ds_config: dict[str, Any]
    batch: Batch
    steps: int
    tokenizer: Tokenizer
    rank: int
    world: int
    device: torch.device


def make_plan(config: Config) -> Plan:
    """Check the recipe against the JSON, the ranks and the tokenizer, before anything is built.

    Raises:
        InputError: something does not fit.
    """
    ds_config = place_monitors(read_deepspeed_json(Path(config.run.deepspeed)), config.run.save)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = plan_batch(ds_config, ranks=world)
    steps = total_steps(config.run.train_tokens, batch=batch.global_batch, seq_length=config.model.seq_length)
    check_scheduler(ds_config, steps=steps)
    vocab = None if config.data.vocab is None else Path(config.data.vocab)
    return Plan(
        config=config,
        ds_config=ds_config,
        batch=batch,
        steps=steps,
        tokenizer=build_tokenizer(config.data.tokenizer, vocab=vocab),
        rank=int(os.environ.get("RANK", "0")),
        world=world,
        device=torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0")))),
    )


def start_distributed(plan: Plan) -> None:
    """Join the process group and make Megatron-core's.

    Raises:
        InputError: a killed build left a lock on which DeepSpeed would wait forever.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # started by plain python: a run of one rank
    os.environ.setdefault("MASTER_PORT", "29500")
    if plan.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start a thread for every core, and they would spend their time waiting for one another.
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if plan.device.type != "cpu":
        get_accelerator().set_device(plan.device.index)
    check_stale_lock()
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    release_shared_memory()
    initialise_megatron(seed=plan.config.run.seed)


def open_data(plan: Plan) -> tuple[Sequences, Sequences]:
    """Training and validation sequences, on every rank.

    Raises:
        InputError: on all ranks, if the data is missing, damaged or too small on one of them.
    """
    config = plan.config
    opened: list[tuple[Sequences, Sequences]] = []

    def open_here() -> None:
        opened.append(
            open_datasets(
                config.data,
                seq_length=config.model.seq_length,
                seed=config.run.seed,
                train_samples=plan.steps * plan.batch.global_batch,
                valid_samples=config.run.eval_sequences,
                tokenizer=plan.tokenizer,
            )
        )

    together(open_here, failing="cannot open the data")
    return opened[0]


def build(plan: Plan) -> torch.nn.Module:
    """The model, with the same weights on every rank."""
    config = plan.config
    model: torch.nn.Module = build_model(
        config.model,
        vocab_size=plan.tokenizer.vocab_size,
        dtype=model_dtype(plan.ds_config),
        device=plan.device,
        seed=config.run.seed,
    )
    return model


def wrap(plan: Plan, model: torch.nn.Module) -> Any:
    """The DeepSpeed engine, with the JSON's optimizer and schedule.

    Raises:
        InputError: DeepSpeed does not accept the JSON.
    """
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=_parameter_groups(plan, model), config=plan.ds_config
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{plan.config.run.deepspeed}: DeepSpeed says of {where}: {first['msg']}") from None
    return engine


def _parameter_groups(plan: Plan, model: torch.nn.Module) -> list[dict[str, Any]]:
    """One group for Merit, which leaves vectors undecayed by itself; for other optimizers vectors are a group."""
    parameters = list(model.parameters())
    if str(section(plan.ds_config, "optimizer").get("type")).lower() == "merit":
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
