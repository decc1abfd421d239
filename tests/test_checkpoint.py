# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a real DeepSpeed engine, ZeRO-2 on 2 gloo ranks: killed, damaged, full, and of another run."""

import json
import logging
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import DAMAGES, MODEL, SHARD, WEIGHTS, build, damage, save, train, weights
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engine_state import message, on_rank_zero
from ranks import run_ranks

from merit_ds import Merit
from merit_ds.training import checkpoint, checkpoint_folder
from merit_ds.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from merit_ds.training.checkpoint_folder import UNFINISHED
from merit_ds.training.manifest import MANIFEST, Manifest
from merit_ds.training.universal import make_universal


def die_within_a_shard(rank: int, folder: Path) -> None:
    """Save step 1, then lose rank 1 while it writes its shard of step 2: rank 0's next collective fails."""
    engine = build()
    train(engine, range(1))
    save(engine, folder, 1)
    torch.save(weights(engine), folder / "weights.pt")
    train(engine, range(1, 2))

    def half_a_shard(state_dict: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        engine.checkpoint_engine.save = half_a_shard
    save(engine, folder, 2)


def check_after_the_kill(folder: Path) -> None:
    engine = build(seed=1)
    assert load_checkpoint(engine, folder, model=MODEL) == {"tokens": 10}
    assert torch.equal(weights(engine), torch.load(folder / "weights.pt"))
    assert save(engine, folder, 3).name == "global_step3"
    assert not list(folder.glob(f"{UNFINISHED}*"))


def check_every_moment(engine: Any, root: Path) -> None:
    """A kill leaves the disk as it is: copy it before each act of rank 0's commit, and look into every copy."""
    folder, copies = root / "moments", root / "copies"
    save(engine, folder, 1)
    save(engine, folder, 2)
    on_rank_zero(copies.mkdir)

    def copying(action: Callable[..., Any]) -> Callable[..., Any]:
        def copy_then_act(*args: Any) -> Any:
            shutil.copytree(folder, copies / str(len(list(copies.iterdir()))))
            return action(*args)

        return copy_then_act

    acts = ((checkpoint_folder, "write_manifest"), (Path, "rename"), (checkpoint, "write_text"), (shutil, "rmtree"))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in acts if torch.distributed.get_rank() == 0 else ():
            patch.setattr(owner, name, copying(getattr(owner, name)))
        save(engine, folder, 3)
    torch.distributed.barrier()
    seen = []
    for copy in sorted(copies.iterdir()):
        found = find_checkpoint(copy)
        assert found is not None
        latest = copy / (copy / "latest").read_text()
        seen.append((found.manifest.step, latest.exists(), len(list(copy.glob("global_step*")))))
    # Before the manifest, the rename, `latest`; then before the oldest is renamed, and removed.
    assert seen == [(2, True, 2), (2, True, 2), (3, True, 3), (3, True, 3), (3, True, 2)]
    assert load_checkpoint(engine, copies / "2", model=MODEL) == {"tokens": 30}


def check_resume(root: Path) -> None:
    """Stopped and continued is bitwise never stopped, optimizer state included."""
    straight = build()
    train(straight, range(4))
    stopped = build()
    train(stopped, range(2))
    save(stopped, root / "resume", 2)
    on_rank_zero(lambda: torch.save(weights(stopped), root / "resume" / "weights.pt"))
    continued = build(seed=1)
    assert load_checkpoint(continued, root / "resume", model=MODEL) == {"tokens": 20}
    train(continued, range(2, 4))
    assert torch.equal(weights(continued), weights(straight))
    assert not torch.equal(weights(continued), weights(stopped))


def check_keep(engine: Any, root: Path) -> None:
    folder = root / "keep"
    for step in (1, 2, 3):
        save(engine, folder, step)
    names = sorted(path.name for path in folder.glob("global_step*"))
    assert names == ["global_step2", "global_step3"]
    assert save(engine, folder, 3).name == "global_step3_2"
    # A run that starts over in the same folder: its checkpoints are the newest, whatever their step.
    assert save(engine, folder, 1).name == "global_step1"
    found = find_checkpoint(folder)
    assert found is not None
    assert (found.path.name, found.manifest.sequence) == ("global_step1", 5)
    assert not list(folder.glob(f"{UNFINISHED}*"))


def check_damage(engine: Any, root: Path) -> None:
    """Each kind of damage to each kind of file makes the one before it the newest complete one, with a named file."""
    lines: list[str] = []
    logger = logging.getLogger("merit_ds.training.checkpoint")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for number, (name, how) in enumerate(DAMAGES):
        folder = root / f"damage_{number}"
        save(engine, folder, 1)
        newest = save(engine, folder, 2)
        on_rank_zero(lambda path=newest / name, how=how: damage(path, how))
        (folder / "latest").write_text("nowhere")
        lines.clear()
        found = find_checkpoint(folder)
        assert found is not None
        assert found.path.name == "global_step1", (name, how)
        if torch.distributed.get_rank() == 0:
            assert len(lines) == 1
            assert str(newest / name) in lines[0]
        else:
            assert lines == []
    on_rank_zero(lambda: damage(folder / "global_step1" / WEIGHTS, "truncated"))
    assert "global_step" in message(lambda: load_checkpoint(engine, folder, model=MODEL))
    logger.removeHandler(handler)


def check_a_damaged_one_does_not_count(engine: Any, root: Path) -> None:
    """Two that are whole stay, and the one between them, whose manifest alone is right."""
    folder, found = root / "uncounted", set[Path]()
    save(engine, folder, 1)
    newest = save(engine, folder, 2)
    on_rank_zero(lambda: damage(newest / SHARD, "flipped bit"))
    load_checkpoint(engine, folder, model=MODEL, damaged=found)
    assert found == {newest.resolve()}
    save_checkpoint(engine, folder, step=3, model=MODEL, client_state={}, keep=2, damaged=found)
    assert sorted(path.name for path in folder.glob("*/")) == ["global_step1", "global_step2", "global_step3"]


def check_full_disk(engine: Any, root: Path) -> None:
    """A rank that cannot write makes every rank raise the same line; the checkpoint before it stays."""
    for victim in (0, 1):
        folder = root / f"full_{victim}"
        save(engine, folder, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if torch.distributed.get_rank() == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        line = message(lambda folder=folder: save(engine, folder, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line.startswith(f"{folder}: cannot save the checkpoint of step 2: rank {victim}: ")
        assert re.search(r"; [\d.]+ GB are free there and global_step1 has 0\.\d+ GB: is the disk full, or", line)
        torch.distributed.barrier()
        assert sorted(path.name for path in folder.glob("*/")) == ["global_step1"]
        assert load_checkpoint(engine, folder, model=MODEL) == {"tokens": 10}
        assert save(engine, folder, 2).name == "global_step2"


def check_other_runs(engine: Any, root: Path) -> None:
    folder = root / "other"
    assert find_checkpoint(folder) is None
    assert load_checkpoint(engine, folder, model=MODEL) is None
    save(engine, folder, 1)
    before = weights(engine)
    wider = {**MODEL, "hidden_size": 34}
    for other, model, line in (
        (engine, wider, "saved with hidden_size 17, this run has 34"),
        (build(stage=0), MODEL, "saved with wrapper DeepSpeedZeroOptimizer, this run has AdamW; set zero_optim"),
        (build(bf16=True), MODEL, "saved with precision fp32, this run has bf16"),
        (build(optimizer=Merit), MODEL, "saved with optimizer AdamW, this run has Merit"),
    ):
        untouched = weights(other)
        assert line in message(lambda other=other, model=model: load_checkpoint(other, folder, model=model))
        assert torch.equal(weights(other), untouched)
    stage_1 = build(stage=1, seed=1)
    load_checkpoint(stage_1, folder, model=MODEL)
    assert torch.equal(weights(stage_1), before)


def check_a_state_that_cannot_be_saved(engine: Any, root: Path) -> None:
    folder = root / "state"
    line = message(lambda: save_checkpoint(engine, folder, step=1, model=MODEL, client_state={"a": lambda: 0}, keep=1))
    assert "rank 0" in line and "free" not in line
    on_rank_zero(lambda: (root / "file").touch())
    assert "file" in message(lambda: save(engine, root / "file", 1))


def check_weights_that_are_not_there(engine: Any, root: Path) -> None:
    """A writer that DeepSpeed leaves behind has written nothing when `save_checkpoint` returns."""
    folder = root / "unwritten"
    save(engine, folder, 1)
    written = engine.save_checkpoint

    def save_late(parent: str, *, tag: str, **options: Any) -> None:
        written(parent, tag=tag, **options)
        on_rank_zero((Path(parent) / tag / WEIGHTS).unlink)

    engine.save_checkpoint = save_late
    refusal = message(lambda: save(engine, folder, 2))
    engine.save_checkpoint = written
    assert "step 2: 0 of 1 files of weights are there" in refusal
    torch.distributed.barrier()  # rank 0 removes what is unfinished, and then refuses too
    assert [path.name for path in folder.glob("*/")] == ["global_step1"]


def all_cases(rank: int, root: Path, killed: Path) -> None:
    check_after_the_kill(killed)
    check_resume(root)
    engine = build()
    train(engine, range(1))
    check_every_moment(engine, root)
    check_keep(engine, root)
    check_damage(engine, root)
    check_a_damaged_one_does_not_count(engine, root)
    check_full_disk(engine, root)
    check_other_runs(engine, root)
    check_a_state_that_cannot_be_saved(engine, root)
    check_weights_that_are_not_there(engine, root)
    save_without_zero(root / "stage_0")


def save_without_zero(folder: Path) -> None:
    engine = build(stage=0)
    train(engine, range(1))
    save(engine, folder, 1)
    on_rank_zero(lambda: torch.save(weights(engine), folder / "weights.pt"))


def load_alone(rank: int, folder: Path) -> None:
    """On another number of ranks: refused until it is converted, and again where the converted one is damaged.

    Without ZeRO every rank has saved the same, and one alone can take it.
    """
    without_zero = build(stage=0, seed=1)
    assert load_checkpoint(without_zero, folder.parent / "stage_0", model=MODEL) == {"tokens": 10}
    assert torch.equal(weights(without_zero), torch.load(folder.parent / "stage_0" / "weights.pt"))
    engine = build(seed=1)
    refusal = message(lambda: load_checkpoint(engine, folder, model=MODEL))
    command = f"python -m merit_ds.training.universal {folder}"
    assert f"saved with ranks 2, this run has 1; convert it by {command}, or start as many as before" in refusal
    universal = make_universal(folder)
    assert load_checkpoint(engine, folder, model=MODEL) == {"tokens": 20}
    assert torch.equal(weights(engine), torch.load(folder / "weights.pt"))
    damage(universal / "zero" / "0.weight" / "exp_avg.pt", "truncated")
    assert message(lambda: load_checkpoint(build(), folder, model=MODEL)) == refusal


def test_a_temporary_name_is_used_once(tmp_path: Path) -> None:
    """A host's NFS client goes on taking a name for the folder that it was, which has been committed since."""
    manifest = Manifest(sequence=1, step=1, zero_stage=2, setup={}, model={}, files={})
    first = checkpoint_folder.begin(tmp_path)
    stale = os.open(first, os.O_PATH)
    committed = checkpoint_folder.commit(tmp_path, first, manifest)
    (tmp_path / UNFINISHED).mkdir()  # an older version's
    second = checkpoint_folder.begin(tmp_path)
    assert second.name != first.name and os.path.samestat(os.stat(stale), committed.stat())
    checkpoint_folder.commit(tmp_path, second, replace(manifest, sequence=2, step=2))
    checkpoint_folder.remove_old(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step2"]


def test_save_find_and_load(tmp_path: Path) -> None:
    """One process group for every case that needs no other, after one that a kill ends."""
    killed = tmp_path / "killed"
    with pytest.raises(AssertionError, match="rank 0"):
        run_ranks(2, die_within_a_shard, killed, timeout=60)
    assert list(killed.glob(f"{UNFINISHED}*"))
    assert (killed / "latest").read_text() == "global_step1"
    run_ranks(2, all_cases, tmp_path, killed)
    folder = tmp_path / "resume"
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run_ranks(1, load_alone, folder)
    assert all(path.read_bytes() == content for path, content in files.items())
    assert not any(UNFINISHED.encode() in content for content in files.values())
    assert json.loads((folder / "global_step2" / MANIFEST).read_text())["model"] == MODEL
    # DeepSpeed's own tool follows our `latest`.
    assert (folder / "zero_to_fp32.py").exists()
    rebuilt = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert torch.equal(torch.cat([tensor.flatten() for tensor in rebuilt.values()]), torch.load(folder / "weights.pt"))
