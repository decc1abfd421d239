# SPDX-License-Identifier: Apache-2.0
"""What happens between the plan and the first step: processes, data, model, engine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError

import merit_ds  # noqa: F401  (registers the optimizer)
from merit_ds.errors import InputError
from merit_ds.gloo_threads import settle_at_exit
from merit_ds.training.agreement import together
from merit_ds.training.checkpoint import holds_checkpoints
from merit_ds.training.config import Config
from merit_ds.training.cpu_comm import check_stale_lock, release_shared_memory
from merit_ds.training.data_manifest import read_manifest
from merit_ds.training.dataset import Sequences, open_datasets
from merit_ds.training.deepspeed_config import model_dtype, parameter_groups
from merit_ds.training.deepspeed_keys import check_keys
from merit_ds.training.model import build_model, initialise_megatron
from merit_ds.training.parallel import MegatronGroups
from merit_ds.training.plan import Plan, continues_itself, local_ranks
from merit_ds.training.rendezvous import open_store, stand_alone
from merit_ds.training.tokenizer import Tokenizer, build_tokenizer
from merit_ds.training.watch import slow_timeout


@dataclass(frozen=True)
class Data:
    """What a run reads: the same on every rank.

    Attributes:
        sha256: of the training and of the validation tokens.
        train_tokens: of the training data, gone through once.
    """

    tokenizer: Tokenizer
    train: Sequences
    valid: Sequences
    sha256: tuple[str, str]
    train_tokens: int


def start_distributed(plan: Plan) -> None:
    """Join the process group and make Megatron-core's.

    Raises:
        InputError: a key of the DeepSpeed JSON is misspelt; the rendezvous fails; a killed build left a lock on which
            DeepSpeed would wait forever; or `run.save` holds another run's checkpoints.
    """
    check_keys(plan.ds_config, path=plan.config.run.deepspeed, quiet=plan.rank != 0)
    stand_alone()
    settle_at_exit()
    if plan.device.type != "cpu":
        get_accelerator().set_device(plan.device.index)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start a thread for every core, and they would spend their time waiting for one another.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))
    check_stale_lock()
    _store = open_store(plan)  # kept until torch has found its server; beneath a Watch it is the Watch's own
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), timeout=slow_timeout(plan), verbose=False
    )
    release_shared_memory()
    tensor_parallel = plan.config.model.tensor_parallel
    initialise_megatron(seed=plan.config.run.seed, device=plan.device, tensor_parallel=tensor_parallel)
    run = plan.config.run
    if run.save and not continues_itself(run) and holds_checkpoints(Path(run.save)):
        # A new run would remove the older one's checkpoints, as it keeps only its newest.
        raise InputError(f"{run.save} holds checkpoints: continue them with --load {run.save}, or --save elsewhere")


def open_data(plan: Plan) -> Data:
    """Tokenizer, training and validation sequences, on every rank.

    Raises:
        InputError: on all ranks, if on one of them the data is missing, damaged, too small or not that of rank 0, or
            the vocabulary cannot be had, which sample text needs.
    """
    config = plan.config
    vocab = None if config.data.vocab is None else Path(config.data.vocab)
    opened: list[Data] = []

    def open_here() -> list[str]:
        tokenizer = build_tokenizer(config.data.tokenizer, vocab=vocab)
        if config.run.sample_tokens:
            tokenizer.encode(config.run.sample_prompt)
        manifest = read_manifest(config.data.prefix, tokenizer=config.data.tokenizer)
        sha256 = (manifest.train.bin.sha256, manifest.valid.bin.sha256)
        train, valid = open_datasets(
            config.data,
            seq_length=config.model.seq_length,
            seed=config.run.seed,
            train_samples=plan.steps * plan.batch.global_batch,
            valid_samples=config.run.eval_sequences,
            tokenizer=tokenizer,
        )
        opened.append(Data(tokenizer, train, valid, sha256, manifest.train.tokens))
        return list(sha256)

    def fetch_vocabulary() -> None:
        # A host's first rank may have to download it; the others then find it in the cache.
        if config.run.sample_tokens and int(os.environ["LOCAL_RANK"]) == 0:
            build_tokenizer(config.data.tokenizer, vocab=vocab).encode(config.run.sample_prompt)

    failing = "cannot open the data"
    together(fetch_vocabulary, failing=failing)
    found = together(open_here, failing=failing)
    for rank, sha256 in enumerate(found):
        if sha256 != found[0]:
            raise InputError(f"{config.data.prefix}: rank {rank} reads other data than rank 0; copy rank 0's there")
    if plan.rank == 0:
        print(_epochs(config, tokens=opened[0].train_tokens), flush=True)
    return opened[0]


def _epochs(config: Config, *, tokens: int) -> str:
    """How often the token budget goes through the training data: a small corpus is repeated without a further word."""
    times = config.run.train_tokens / tokens
    return f"training data    {config.data.prefix}, {tokens:,} tokens: the budget goes through it {times:.3g} times"


def build(plan: Plan, data: Data) -> torch.nn.Module:
    """The model, with the same weights on every data-parallel rank.

    Raises:
        InputError: the vocabulary does not split over the tensor-parallel ranks.
    """
    config = plan.config
    model: torch.nn.Module = build_model(
        config.model,
        vocab_size=data.tokenizer.vocab_size,
        dtype=model_dtype(plan.ds_config),
        device=plan.device,
        seed=config.run.seed,
    )
    return model


def wrap(plan: Plan, model: torch.nn.Module) -> Any:
    """The DeepSpeed engine, with the JSON's optimizer and schedule.

    Raises:
        InputError: DeepSpeed does not accept the JSON, or would do other steps than the plan.
    """
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(plan.ds_config, model.parameters()),
            mpu=MegatronGroups() if plan.config.model.tensor_parallel > 1 else None,
            config=plan.ds_config,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{plan.config.run.deepspeed}: DeepSpeed says of {where}: {first['msg']}") from None
    except DeepSpeedConfigError as error:
        raise InputError(f"{plan.config.run.deepspeed}: DeepSpeed does not accept it: {error}") from None
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        # What DeepSpeed raises for an unknown type or option; a fault of our own looks alike: its traceback is shown.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{plan.config.run.deepspeed}: DeepSpeed does not accept it: {reason}") from error
    _check_steps(plan, engine)
    return engine


def _check_steps(plan: Plan, engine: Any) -> None:
    """A key that makes DeepSpeed divide the ranks in its own way would make it skip steps, or do them twice."""
    ranks = plan.world // plan.config.model.tensor_parallel
    for name, here, there in (
        ("data-parallel ranks", ranks, engine.dp_world_size),
        ("micro-batches a step", plan.batch.accumulation, int(engine.gradient_accumulation_steps())),
        ("sequences a step", plan.batch.global_batch, engine.train_batch_size()),
    ):
        if here != there:
            raise InputError(
                f"{plan.config.run.deepspeed}: DeepSpeed makes {there} {name} of it, where this trainer has {here}: "
                "remove the key that does, for instance sequence_parallel_size"
            )
