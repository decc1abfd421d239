# SPDX-License-Identifier: Apache-2.0
"""The real trainer where what read its output has gone."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import launch
import pytest

from merit_ds.training import output

RECIPE = """
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: tiny.json, train_tokens: 25600000, eval_interval: 100000, eval_sequences: 6, save: run}
"""
DEEPSPEED = """
{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "Merit", "params": {"lr": 0.01}}}
"""
ALONE = launch.environment() | {"MASTER_PORT": str(launch.PORT)}
"""Beside other runs of this machine."""


@pytest.mark.parametrize("stderr", [subprocess.STDOUT, subprocess.PIPE], ids=["both", "each"])
def test_a_run_that_is_stopped_after_its_reader_has_gone_saves_and_ends_well(tmp_path: Path, stderr: Any) -> None:
    """As DeepSpeed's pdsh runner stops a job, and Ctrl-C one whose output goes to `tee`."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "tiny.json").write_text(DEEPSPEED)
    launch.prepare_text(tmp_path)
    run = subprocess.Popen(
        launch.command(ranks=0),
        cwd=tmp_path,
        env=ALONE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    assert run.stdout is not None
    said = ""
    while " iteration  " not in (said := run.stdout.readline()):
        assert said, "it ended before its first step"
    run.stdout.close()
    steps = len(launch.losses(tmp_path / "run"))
    while len(launch.losses(tmp_path / "run")) < steps + 5:
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 0
    assert (tmp_path / "run" / "latest").read_text() == f"global_step{max(launch.losses(tmp_path / 'run'))}"


def test_a_full_disk_under_a_log_file_is_heard_of() -> None:
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space left"):
        output._Outliving(full).write("a line\n" * 10_000)


def test_the_budget_is_told_in_epochs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("25600000", "2560"))
    (tmp_path / "tiny.json").write_text(DEEPSPEED)
    launch.prepare_text(tmp_path)
    said = subprocess.run(launch.command(ranks=0), cwd=tmp_path, env=ALONE, text=True, capture_output=True).stdout
    assert "training data    data, 9,081 tokens: the budget goes through it 0.282 times" in said
