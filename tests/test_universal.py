# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ZeRO-1 and 2 converted to DeepSpeed's universal format and loaded on other numbers of ranks.

In the spirit of DeepSpeed's `tests/unit/checkpoint/test_universal_checkpoint.py`, which compares Adam's weights and
state within a tolerance; here they are equal bit for bit, and so is what follows.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_state import assert_equal, build, message, on_rank_zero, step_exactly, train, whole
from ranks import run_ranks
from zero_cases import Case

from merit_ds.training.checkpoint import load_checkpoint, save_checkpoint
from merit_ds.training.checkpoint_folder import UNFINISHED
from merit_ds.training.universal import make_universal

SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.03, "warmup_num_steps": 6}}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    Case("zero1_fp32", zero={"stage": 1}, extra=SCHEDULE),
    # The last group is three elements: most ranks hold nothing of it.
    Case("zero2_bf16_groups", "bf16", 3, {"stage": 2}, SCHEDULE),
    Case("zero1_bf16_groups", "bf16", 3, {"stage": 1}),
    Case("bf16_optimizer_groups", "bf16", 3, {"stage": 1}, FP32_ACCUMULATION),
    Case("zero2_offload_padded", "fp32", 3, {"stage": 2, "parameter_alignment": True} | OFFLOAD),
    Case("zero2_elastic", "fp32", 2, {"stage": 2, "elastic_checkpoint": True}, SCHEDULE),
]
WORLDS = (4, 2, 1, 3)
SGD = {"zero_allow_untested_optimizer": True, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}


def save(engine: Any, folder: Path, step: int) -> Path:
    return save_checkpoint(engine, folder, step=step, model={}, client_state={"step": step}, keep=2)


def lacks_a_fragment(engine: Any) -> bool:
    """Whether this rank holds nothing of some group."""
    groups = getattr(engine.optimizer, "bit16_groups", None) or engine.optimizer.bf16_groups
    return any(all(parameter._hp_mapping is None for parameter in group) for group in groups)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def continue_cases(rank: int, root: Path, first: bool) -> list[bool]:
    """Load what another number of ranks saved, compare, take exact steps, and save for the next."""
    gc.freeze()  # BF16_Optimizer's constructor collects garbage eight times, to tell the memory in use
    lacking = []
    for case in CASES:
        folder, engine = root / case.name, build(case)
        lacking.append(lacks_a_fragment(engine))
        if first:
            with torch.no_grad():  # DeepSpeed's own loading leaves both as the new run has them
                engine.module.frozen.add_(1)
                engine.module.seen.add_(7)
        else:
            if case.groups == 3:
                train(engine, range(9, 10))  # Merit has bound its layout, and the state is not empty
            state = load_checkpoint(engine, folder, model={})
            assert state == {"step": engine.global_steps}
            assert_equal(whole(engine), torch.load(folder / "whole.pt"))
        for step in range(engine.global_steps, engine.global_steps + 2):
            step_exactly(engine, step)
        save(engine, folder, engine.global_steps)
        kept = whole(engine)
        if rank == 0:
            torch.save(kept, folder / "whole.pt")
        engine.destroy()
        dist.barrier()
    if dist.get_world_size() == 2:
        check_failures(root)
    return lacking


def test_resharding_from_4_ranks_to_2_to_1_to_3_is_exact(tmp_path):
    """Answers to TestZeROUniversalCheckpointDP in DeepSpeed's test_universal_checkpoint.py.

    And a regression test: DeepSpeed 0.19.8's loading raises IndexError on a rank that holds nothing of a group. The
    process group of 2 ranks serves the failures as well.
    """
    run_ranks(WORLDS[0], continue_cases, tmp_path, True)
    for world in WORLDS[1:]:
        for case in CASES:
            folder = tmp_path / case.name
            newest, before = (folder / "latest").read_text(), contents(folder)
            path = make_universal(folder)
            assert path == folder / f"{newest}_universal"
            assert make_universal(folder) == path
            assert {file: content for file, content in contents(folder).items() if path not in file.parents} == before
        lacking = run_ranks(world, continue_cases, tmp_path, False)
    assert any(any(found) for found in lacking)


def check_a_rank_that_fails(root: Path) -> None:
    """A file that only one rank cannot read: every rank raises its reason, and none waits for another."""
    folder, engine = root / "fails", build(CASES[0])
    train(engine, range(1))
    save(engine, folder, 1)
    on_rank_zero(lambda: make_universal(folder))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(torch, "load", fail_on("exp_avg_sq.pt", torch.load))
        assert "cannot load it: rank 1: [Errno 5] gone" in message(lambda: load_checkpoint(engine, folder, model={}))


def fail_on(name: str, load: Any) -> Any:
    def load_or_fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(5, "gone", str(path))
        return load(path, *args, **kwargs)

    return load_or_fail


def check_round_robin(root: Path) -> None:
    """DeepSpeed's fragment map is wrong there: neither such a run's checkpoint is converted, nor one loaded into it."""
    round_robin = build(Case("round_robin", zero={"stage": 2, "round_robin_gradients": True}, extra=SCHEDULE))
    folder = root / "round_robin"
    train(round_robin, range(1))
    save(round_robin, folder, 1)
    on_rank_zero(
        lambda: check_refusal(folder, "zero_optimization.round_robin_gradients is on in the DeepSpeed JSON of")
    )
    line = message(lambda: load_checkpoint(round_robin, root / "fails", model={}))
    assert "zero_optimization.round_robin_gradients is on in the DeepSpeed JSON" in line


def check_refusal(folder: Path, line: str) -> None:
    """The conversion is refused with `line`, and the folder is as it was."""
    before = contents(folder)
    assert line in message(lambda: make_universal(folder))
    assert contents(folder) == before
    assert not list(folder.glob(f"{UNFINISHED}*"))


def check_refusals(root: Path) -> None:
    """Nothing to convert, and no state that can be: an error of one line, and nothing is left behind."""
    for case, reason in (
        (Case("stage_0"), "saved under ZeRO stage 0, so it loads on any number of ranks as it is"),
        (Case("sgd", zero={"stage": 1}, extra=SGD), "its optimizer's state is not exp_avg and exp_avg_sq"),
    ):
        engine, folder = build(case), root / case.name
        train(engine, range(1))
        save(engine, folder, 1)
        on_rank_zero(lambda folder=folder, reason=reason: check_refusal(folder, reason))


def check_failures(root: Path) -> None:
    """Every rank raises the same line, and what was on the disk stays as it was."""
    check_a_rank_that_fails(root)
    check_round_robin(root)
    check_refusals(root)


def test_the_command_says_what_is_wrong(tmp_path):
    for folder, reason in ((tmp_path / "nowhere", "no checkpoint there"), (tmp_path, "no complete checkpoint among 1")):
        (tmp_path / "global_step1").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "merit_ds.training.universal", str(folder)]
        finished = subprocess.run(command, text=True, capture_output=True)
        assert finished.returncode == 1
        assert finished.stderr.startswith(f"error: {folder}: {reason}") and finished.stderr.count("\n") == 1
