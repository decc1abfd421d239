# SPDX-License-Identifier: Apache-2.0
"""Make a run's newest checkpoint loadable on any number of ranks.

    python -m merit_ds.training.universal runs/gpt2

ZeRO cuts weights and optimizer state into one shard for each rank, so a checkpoint fits the number of ranks that it was
saved on. This puts the shards together to whole parameters, in DeepSpeed's universal format, as a further checkpoint in
the same folder, `global_step{N}_universal`. What is there stays untouched. Being the newest, it is what `--load` takes,
on any number of ranks, with the same train_batch_size, and bit for bit the same weights, moments and schedule.

It needs one process, no GPU, and while it works room on the disk for two more of the checkpoint. No run may save to the
folder meanwhile.
"""

import argparse
import itertools
import logging
import os
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.training.checkpoint_folder import (
    Checkpoint,
    begin,
    commit,
    file_names,
    flush_and_hash,
    next_sequence,
    read_checkpoints,
)
from merit_ds.training.cli import report_errors
from merit_ds.training.manifest import find_damage

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.training.universal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the run's checkpoint folder (run.save)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; each holds a shard in memory (default: 1)"
    )
    arguments = parser.parse_args()
    with report_errors():
        path = make_universal(arguments.folder, workers=arguments.workers)
        print(f"{path}: loads on any number of ranks; continue with --load {arguments.folder}")


def make_universal(folder: Path, *, workers: int = 1) -> Path:
    """Convert the newest complete checkpoint in `folder`. One process alone calls this, while no run saves there.

    Returns:
        The universal checkpoint; where the newest is one already, that, and nothing is written.

    Raises:
        InputError: there is no complete checkpoint, or it cannot be converted; what was there before is still there.
    """
    newest = newest_complete(folder)
    if newest.manifest.universal:
        return newest.path
    if newest.manifest.zero_stage == 0:
        raise InputError(f"{newest.path}: saved under ZeRO stage 0, so it loads on any number of ranks as it is")
    print(f"{newest.path}: converting", flush=True)
    try:
        return _convert(folder, newest, workers=workers)
    except InputError as error:
        raise InputError(f"{newest.path}: {error}") from None
    except Exception as error:  # DeepSpeed's converter asserts
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(f"{newest.path}: cannot convert it: {reason}") from error


def newest_complete(folder: Path, *, step: int | None = None) -> Checkpoint:
    """The newest complete checkpoint in `folder`, or the newest of `step`. One process alone calls this.

    Every file is hashed. For each damaged one that is newer a warning is logged.

    Raises:
        InputError: there is none, or none that is complete.
    """
    checkpoints, problems = read_checkpoints(folder)
    if step is not None:
        steps = sorted({checkpoint.manifest.step for checkpoint in checkpoints})
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.manifest.step == step]
        if steps and not checkpoints:
            raise InputError(f"{folder}: no checkpoint of step {step}; there are those of {', '.join(map(str, steps))}")
    for checkpoint in checkpoints:
        files = tqdm(checkpoint.manifest.files.items(), desc=f"checking {checkpoint.path.name}", unit="file")
        found = (find_damage(checkpoint.path / name, expected) for name, expected in files)
        damage = next((line for line in found if line), None)
        if damage is None:
            for problem in problems:
                logger.warning("skipped a damaged checkpoint: %s", problem)
            return checkpoint
        problems.append(damage)
    if problems:
        raise InputError(f"{folder}: no complete checkpoint among {len(problems)}; the first: {problems[0]}")
    raise InputError(f"{folder}: no checkpoint there; name the folder that the run saves to (run.save)")


def _convert(folder: Path, source: Checkpoint, *, workers: int) -> Path:
    # Imported here, so that --help and a wrong folder need no seconds.
    from deepspeed.checkpoint import ds_to_universal

    from merit_ds.training.safe_load import no_code, stage_as_number

    stage_as_number()
    unfinished = begin(folder)
    try:
        _stage(source.path, unfinished / "source")
        written = unfinished / "universal"
        # Its progress bars go to stderr, as ours do; its worker processes are forks, which are bound by `no_code` too.
        with redirect_stdout(None), no_code(source.path):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(unfinished / "source"),
                    output_folder=str(written),
                    num_extract_workers=workers,
                    num_merge_workers=workers,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=False,
                )
            )
        files = flush_and_hash(written, tqdm(file_names(written), desc="hashing", unit="file"))
        manifest = replace(source.manifest, sequence=next_sequence(folder), universal=True, files=files)
        return commit(folder, written, manifest)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _stage(checkpoint: Path, staged: Path) -> None:
    """Lay out the checkpoint's shards as the converter can read them; links where it can read them as they are."""
    import torch

    from merit_ds.training.resharding import refuse_round_robin
    from merit_ds.training.safe_load import read

    staged.mkdir()
    for path in checkpoint.glob("mp_rank_*_model_states.pt"):
        state = read(path)
        _refuse_paths(state["param_shapes"])
        zero = state["ds_config"].get("zero_optimization", {})
        refuse_round_robin(zero.get("round_robin_gradients", False), where="the DeepSpeed JSON of its run")
        # Megatron-core's layers hold an extra state of None or bytes, which the converter takes for a weight.
        state["module"] = {name: value for name, value in state["module"].items() if isinstance(value, torch.Tensor)}
        torch.save(state, staged / path.name)
    for path in checkpoint.glob("*_optim_states.pt"):
        state = read(path, mmap=True)
        _refuse_paths(state["optimizer_state_dict"]["param_slice_mappings"])
        if _repair(state["optimizer_state_dict"]):
            torch.save(state, staged / path.name)
        else:
            (staged / path.name).symlink_to(os.path.relpath(path, staged))


def _refuse_paths(groups: list[dict[str, Any]]) -> None:
    """The converter writes to folders that it names after the parameters: none may lead out of the checkpoint.

    Raises:
        InputError: a group's parameter has a path for a name.
    """
    for name in itertools.chain.from_iterable(groups):
        if Path(name).name != name:
            raise InputError(f"refused: a parameter is called {name!r}, which is a path")


def _repair(optimizer: dict[str, Any]) -> bool:
    """Put right, in a shard's state, what the converter of DeepSpeed 0.19.8 stumbles over; whether there was any.

    With `elastic_checkpoint` a shard has one state for each group, without padding, and no settings of the groups but
    the step count. BF16_Optimizer notes a small group's padding on all ranks as if the last rank had it all. The
    converter would cut the padding off, which it need not: it takes the fragments out by their addresses.

    Raises:
        InputError: the optimizer has other state than the converter knows.
    """
    base = optimizer["base_optimizer_state"]
    elastic = isinstance(base, list)
    states = dict(enumerate(base)) if elastic else base["state"]
    paddings = optimizer["group_paddings"]
    for index in range(len(paddings)):
        if not {"exp_avg", "exp_avg_sq"} <= states.get(index, {}).keys():
            raise InputError("its optimizer's state is not exp_avg and exp_avg_sq, and DeepSpeed converts no other")
    if not elastic and all(states[index]["exp_avg"].numel() >= padding for index, padding in enumerate(paddings)):
        return False
    if elastic:
        step = optimizer["base_optimizer_state_step"]
        groups = [{"params": [index], "step": step} for index in states]
        optimizer["base_optimizer_state"] = {"state": states, "param_groups": groups}
    optimizer["group_paddings"] = [0] * len(paddings)
    return True


if __name__ == "__main__":
    main()
