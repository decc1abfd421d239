# SPDX-License-Identifier: Apache-2.0
"""What a run must have in common with the one whose checkpoint it continues, and what may differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.training.checkpoint import load_checkpoint, reshard
from merit_ds.training.plan import Plan, continues_itself
from merit_ds.training.setup import Data
from merit_ds.training.watch import Watch


def continue_run(
    engine: Any, plan: Plan, data: Data, watch: Watch, *, say: Callable[[str], None], damaged: set[Path]
) -> int:
    """Load the newest complete checkpoint of `run.load` into the engine. A collective.

    Where that is the run's own folder, a run may go on with another number of ranks, for instance after a host was
    lost: the checkpoint is converted first. The global batch stays, and the accumulation follows from the ranks.

    Args:
        say: shows a line to people.
        damaged: newer checkpoints that are not complete are added to it.

    Returns:
        Optimizer steps done so far; 0 where the run's own folder holds nothing to continue yet.

    Raises:
        InputError: nothing to continue from in another folder, or a checkpoint of other data, order, model or set-up.
    """
    folder, batch = Path(str(plan.config.run.load)), plan.batch
    own = continues_itself(plan.config.run)
    if own:
        with watch.untimed("converting a checkpoint to this number of ranks"):
            resharded = reshard(engine, folder, model=model_settings(plan, data), damaged=damaged)
        watch.at("loading a checkpoint", slow=True)
        if resharded:
            say(f"{resharded}: a checkpoint for any number of ranks")
    state = load_checkpoint(engine, folder, model=model_settings(plan, data), damaged=damaged)
    if state is None:
        if not own:
            raise InputError(f"{folder}: no checkpoint there; check run.load, or leave it out to start anew")
        return 0
    for key, here in data_order(plan, data).items():
        if state["order"][key] != here:
            raise InputError(
                f"{folder}: {key} was {state['order'][key]} and is {here} in this run, so it would see other "
                "sequences: continue with the same recipe and data"
            )
    say(f"continuing from step {state['step']} in {plan.config.run.load}")
    before = state.get("ranks", plan.world)
    if before != plan.world:
        say(
            f"ranks before: {before}, now: {plan.world}; train_batch_size stays {batch.global_batch}, in "
            f"{batch.accumulation} micro-batches a rank; the losses will differ by the order of sums"
        )
    return int(state["step"])


def data_order(plan: Plan, data: Data) -> dict[str, Any]:
    """What decides which sequences a step takes."""
    return {
        "run.seed": plan.config.run.seed,
        "train_batch_size": plan.batch.global_batch,
        "the number of steps": plan.steps,
        "the training data's sha256": data.sha256[0],
    }


def model_settings(plan: Plan, data: Data) -> dict[str, Any]:
    """What a checkpoint fits."""
    return plan.config.model.identity() | {"vocab_size": data.tokenizer.vocab_size}
