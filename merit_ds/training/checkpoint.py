# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a kill at any moment cannot spoil: saving, finding the newest complete one, loading it.

DeepSpeed writes the shards, in its own layout, so its tools (`zero_to_fp32.py`, `ds_to_universal`) work on the result;
but the former does not read what BF16_Optimizer wrote (bf16, stage 1 and `grad_accum_dtype` fp32).
Its `latest` is no commit marker, though: rank 0 writes it while other ranks may still be writing. So here
1. the shards go into a folder with a temporary name, and every rank agrees that all are written;
2. every rank flushes and hashes its share of the files; rank 0 writes them into `manifest.json`;
3. rank 0 renames the folder to `global_step{N}`, which commits it, then replaces `latest`, then removes old ones.
Whatever is not renamed, or does not match its manifest, is no checkpoint.

ZeRO's shards fit the number of ranks that saved them. `merit_ds.training.universal` makes a checkpoint of them that
fits any number, and its manifest says so: loading takes either kind, whatever `checkpoint.load_universal` says.

DeepSpeed's files are pickles: the hashes are compared first, which tell damage, not malice, and then they are read as
`merit_ds.training.safe_load` has it, which runs no code.
"""

import itertools
import logging
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from merit_ds.errors import InputError
from merit_ds.training.agreement import from_rank_zero, together
from merit_ds.training.checkpoint_fit import check_fit, fits_ranks, setup_of
from merit_ds.training.checkpoint_folder import (
    Checkpoint,
    begin,
    commit,
    file_names,
    flush_and_hash,
    next_sequence,
    read_checkpoints,
    remove_old,
    shortage,
)
from merit_ds.training.manifest import Manifest, find_damage, write_text
from merit_ds.training.resharding import load_universal, universal_info
from merit_ds.training.safe_load import no_code, refuse_extra_state, refuse_other, stage_as_number
from merit_ds.training.universal import make_universal

CLIENT_STATE = "merit_ds"
"""The key of the trainer's state within DeepSpeed's, which has keys of its own beside it."""
logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: Any,
    folder: Path,
    *,
    step: int,
    model: dict[str, Any],
    client_state: dict[str, Any],
    keep: int,
    damaged: Collection[Path] = (),
) -> Path:
    """Save a checkpoint. A collective: every rank calls it after the same step.

    Args:
        engine: the DeepSpeed engine, ZeRO stage 0, 1 or 2.
        folder: the run's checkpoint folder, made where missing; on several hosts one that they share.
        step: optimizer steps that were done.
        model: the model's settings, JSON-able; `load_checkpoint` compares them.
        client_state: what the trainer needs to continue. Rank 0's is saved, and comes back on every rank.
        keep: complete checkpoints that stay, the new one included; at least 1.
        damaged: of `load_checkpoint`: they do not count.

    Returns:
        The checkpoint's path, `folder/global_step{step}`; with a number behind it where that name is taken.

    Raises:
        InputError: on every rank, with the reason of the rank that failed, for instance a full disk. What was there
            before is still there.
    """
    failing = f"{folder}: cannot save the checkpoint of step {step}"
    if engine.use_node_local_storage():
        raise InputError(f"{failing}: remove checkpoint.use_node_local_storage from the DeepSpeed JSON")
    unfinished = folder / from_rank_zero(lambda: begin(folder).name, failing=failing)
    try:
        together(lambda: _write_shards(engine, unfinished, client_state), failing=failing)
        manifest = Manifest(
            sequence=from_rank_zero(lambda: next_sequence(folder), failing=failing),
            step=step,
            zero_stage=int(engine.zero_optimization_stage()),
            setup=setup_of(engine),
            model=model,
            files=_hash_shares(unfinished, engine, failing=failing),
        )
        path = folder / from_rank_zero(lambda: _commit(folder, unfinished, manifest), failing=failing)
    except InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    from_rank_zero(
        lambda: remove_old(folder, keep=keep, damaged=damaged), failing=f"{folder}: cannot remove old checkpoints"
    )
    return path


def find_checkpoint(folder: Path, *, damaged: set[Path] | None = None) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, or None where there is none at all. A collective.

    Every rank hashes a share of the files, and all take the same checkpoint. For each damaged one that is newer, rank
    0 logs a warning that names the file.

    Args:
        damaged: their resolved paths are added to it.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    failing = f"{folder}: cannot look for checkpoints"
    listed, problems = from_rank_zero(lambda: _list(folder), failing=failing)
    for name, manifest in listed:
        checkpoint = Checkpoint(folder / name, Manifest.from_plain(manifest))
        damage = _find_damage(checkpoint)
        if damage is None:
            _warn(problems)
            return checkpoint
        problems.append(damage)
        if damaged is not None:
            damaged.add(checkpoint.path.resolve())
    if problems:
        raise InputError(f"{folder}: no complete checkpoint among {len(problems)}; the first: {problems[0]}")
    return None


def _list(folder: Path) -> list[list[Any]]:
    """What `read_checkpoints` returns, as names and plain manifests."""
    checkpoints, problems = read_checkpoints(folder)
    return [[[checkpoint.path.name, checkpoint.manifest.plain()] for checkpoint in checkpoints], problems]


def holds_checkpoints(folder: Path) -> bool:
    """Whether anything in `folder` has a checkpoint's name, complete or not. A collective."""
    failing = f"{folder}: cannot look for checkpoints"
    return from_rank_zero(lambda: any(folder.glob("global_step*")), failing=failing)


def reshard(engine: Any, folder: Path, *, model: dict[str, Any], damaged: set[Path] | None = None) -> str | None:
    """Make the newest complete checkpoint fit this number of ranks, where it is only that which differs. A collective.

    Rank 0 converts it (`merit_ds.training.universal`); the checkpoint itself stays as it is.

    Args:
        model: as given to `save_checkpoint`.
        damaged: as for `find_checkpoint`.

    Returns:
        The new checkpoint's path; None where nothing was to be done.

    Raises:
        InputError: as `make_universal`; or the checkpoint differs in something else as well.
    """
    listed, _ = from_rank_zero(lambda: _list(folder), failing=f"{folder}: cannot look for checkpoints")
    here = setup_of(engine)
    if all(fits_ranks(Manifest.from_plain(manifest), here) for _, manifest in listed):
        return None  # without reading the files: loading does that
    checkpoint = find_checkpoint(folder, damaged=damaged)
    if checkpoint is None or fits_ranks(checkpoint.manifest, here):
        return None
    converted = replace(checkpoint.manifest, universal=True)
    check_fit(replace(checkpoint, manifest=converted), engine, model)
    return from_rank_zero(lambda: str(make_universal(folder)), failing=f"{folder}: cannot convert a checkpoint")


def load_checkpoint(
    engine: Any, folder: Path, *, model: dict[str, Any], damaged: set[Path] | None = None
) -> dict[str, Any] | None:
    """Load the newest complete checkpoint into the engine. A collective; the files stay as they are.

    Args:
        engine: the DeepSpeed engine, set up as when the checkpoint was saved. ZeRO stages 1 and 2 load each other's
            checkpoints; the number of ranks may be another where the checkpoint is universal, or of stage 0.
        folder: the run's checkpoint folder.
        model: as given to `save_checkpoint`.
        damaged: as for `find_checkpoint`.

    Returns:
        The client state that was saved; None where there is no checkpoint at all.

    Raises:
        InputError: before anything is loaded: there are checkpoints but none is complete, or the newest is of another
            model, number of ranks, precision, optimizer or ZeRO layout; names both values and the key to change.
    """
    checkpoint = find_checkpoint(folder, damaged=damaged)
    if checkpoint is None:
        return None
    check_fit(checkpoint, engine, model)
    states: dict[str, Any] = {}

    def load() -> None:
        states.update(_load(engine, checkpoint))

    together(load, failing=f"{checkpoint.path}: cannot load it")
    return dict(states[CLIENT_STATE])


def _write_shards(engine: Any, unfinished: Path, client_state: dict[str, Any]) -> None:
    state = {CLIENT_STATE: client_state} | universal_info(engine.module)
    stage_as_number()
    try:
        engine.save_checkpoint(str(unfinished.parent), tag=unfinished.name, client_state=state, save_latest=False)
    except Exception as error:
        # torch hides the reason of a write that fails in a RuntimeError of its zip file.
        room = shortage(unfinished.parent) if isinstance(error, (OSError, RuntimeError)) else ""
        # DeepSpeed's last act is a barrier: the ranks that did not fail wait there for this one.
        dist.barrier()
        if room:
            raise OSError(f"{error}; {room}") from error
        raise


def _load(engine: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    refuse_extra_state(checkpoint.path)
    engine._config.load_universal_checkpoint = checkpoint.manifest.universal
    with no_code(checkpoint.path):
        if checkpoint.manifest.universal:
            state = load_universal(engine, checkpoint.path)
        else:
            state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)[1]
    if engine.lr_scheduler is not None:
        # Its position has been restored. The learning rates are the optimizer's, and not in an elastic checkpoint.
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
    return state


def _hash_shares(unfinished: Path, engine: Any, *, failing: str) -> dict[str, tuple[int, str]]:
    """Every file's size and sha256; each rank looks into a share of the files, and flushes it to the disk first."""
    names = from_rank_zero(lambda: file_names(unfinished), failing=failing)
    shards = sum(name.endswith("_optim_states.pt") for name in names)
    if engine.zero_optimization_stage() > 0 and shards != dist.get_world_size():
        raise InputError(f"{failing}: {shards} of {dist.get_world_size()} ranks' shards are there: one folder for all?")
    models, splits = sum(name.endswith("_model_states.pt") for name in names), setup_of(engine)["tensor_parallel"]
    if models != splits:
        raise InputError(f"{failing}: {models} of {splits} files of weights are there: one folder for all?")
    share = names[dist.get_rank() :: dist.get_world_size()]

    def hash_share() -> list[list[Any]]:
        for name in share:
            refuse_other(unfinished / name)
        return [[name, *entry] for name, entry in flush_and_hash(unfinished, share).items()]

    entries = itertools.chain.from_iterable(together(hash_share, failing=failing))
    return {name: (size, sha256) for name, size, sha256 in sorted(entries)}


def _commit(folder: Path, unfinished: Path, manifest: Manifest) -> str:
    name = commit(folder, unfinished, manifest).name
    write_text(folder / "latest", name)
    return name


def _find_damage(checkpoint: Checkpoint) -> str | None:
    """The first damaged file, the same on every rank."""
    share = list(checkpoint.manifest.files.items())[dist.get_rank() :: dist.get_world_size()]
    found = together(
        lambda: [find_damage(checkpoint.path / name, expected) for name, expected in share],
        failing=f"{checkpoint.path}: cannot check it",
    )
    return next((damage for damage in itertools.chain.from_iterable(found) if damage), None)


def _warn(problems: list[str]) -> None:
    if dist.get_rank() == 0:
        for problem in problems:
            logger.warning("skipped a damaged checkpoint: %s", problem)
