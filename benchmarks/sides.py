# SPDX-License-Identifier: Apache-2.0
"""The two that are compared, built from one plan: pretrain_gpt.py's trainer and the plain loop."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_loop import PlainLoop

from merit_ds.training import setup
from merit_ds.training.data_manifest import split_prefix
from merit_ds.training.deepspeed_config import MONITORS, model_dtype
from merit_ds.training.interrupt import Interrupt
from merit_ds.training.model import padded_vocab
from merit_ds.training.plan import Plan
from merit_ds.training.trainer import Trainer
from merit_ds.training.watch import Watch

PARTS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        train_step: one whole optimizer step; a collective.
        parts: the object whose methods PARTS do most of a step's work.
        parameters: trainable ones.
    """

    train_step: Callable[[], object]
    parts: Any
    parameters: int


def build_sides(plan: Plan) -> dict[str, Side]:
    """Both sides, by name. A collective.

    Raises:
        InputError: the data or the recipe cannot be used.
        RuntimeError: the two models differ in size, so the comparison would be of no use.
    """
    quiet = {key: value for key, value in plan.ds_config.items() if key not in (*MONITORS, "wandb")}
    plan = replace(plan, ds_config=quiet)  # neither side logs
    data = setup.open_data(plan)
    sides = {"trainer": _trainer(plan, data), "plain": _plain(plan, vocab_size=data.tokenizer.vocab_size)}
    counts = {name: side.parameters for name, side in sides.items()}
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the two models differ in size: {counts}")
    return sides


def _trainer(plan: Plan, data: setup.Data) -> Side:
    engine = setup.wrap(plan, setup.build(plan, data))
    trainer = Trainer(engine, plan, data, Watch(plan))
    return Side(partial(trainer_step, trainer), engine, _trainable(engine.module))


def trainer_step(trainer: Trainer) -> None:
    """One optimizer step, unless a signal asks to stop."""
    with Interrupt() as interrupt:
        signum = trainer.train_step(interrupt)
    if signum:
        sys.exit(128 + signum)


def _plain(plan: Plan, *, vocab_size: int) -> Side:
    config = plan.config
    loop = PlainLoop(
        config.model,
        rows=padded_vocab(vocab_size, multiple=config.model.vocab_multiple),
        batch=plan.batch,
        tokens=Path(split_prefix(config.data.prefix, "train") + ".bin"),
        dtype=model_dtype(plan.ds_config),
        device=plan.device,
        rank=plan.rank,
    )
    return Side(loop.train_step, loop, _trainable(loop.ddp))


def _trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
