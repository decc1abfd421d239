# SPDX-License-Identifier: Apache-2.0
"""Small studies for the real trainer, and the laboratory as a command."""

import json
import os
import subprocess
import sys
import time

from launch import REPOSITORY, prepare_text

RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: tiny.json, train_tokens: 1, eval_sequences: 6}
"""
DEEPSPEED = {
    "zero_optimization": {"stage": 1},
    "tensorboard": {"enabled": True},
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}
STUDY = """
base: tiny.yaml
tokens: 1280
micro_batch: 4
optimizers:
  MERIT: {type: Merit}
  MERIT without clip: {type: Merit, params: {clip: null}, lr_of: MERIT}
  unknown: {type: Nope}
grids:
  - {name: coarse, optimizer: [MERIT], batch: [8], lr: [0.02, 3e38]}
  - {name: failing, optimizer: [unknown], batch: [8], lr: [1]}
  - {name: ablations, optimizer: [MERIT without clip], batch: [8], lr: best}
"""
LONG = """
base: tiny.yaml
tokens: 40_960
micro_batch: 4
evaluations: 6
checkpoints: 32
optimizers: {MERIT: {type: Merit}}
grids: [{name: one, optimizer: [MERIT], batch: [8], lr: [0.02]}]
"""
BROKEN = STUDY.replace("lr: [0.02, 3e38]", "lr: [0.02]").replace("type: Nope", "type: Adam").replace("[1]", "[1, 2, 3]")
PAIR = STUDY.replace("lr: [0.02, 3e38]", "lr: [0.02], seed: [1, 2]").split("  - {name: failing")[0]


def write_studies(path):
    """Studies, their recipe, and data: real English from the licence."""
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "tiny.json").write_text(json.dumps(DEEPSPEED))
    for name, text in (("study", STUDY), ("long", LONG), ("pair", PAIR), ("broken", BROKEN)):
        (path / f"{name}.yaml").write_text(text)
    prepare_text(path)
    return path


def command(name, output, *arguments, data="data"):
    given = ["--data", data, "--output", output, "--script", str(REPOSITORY / "pretrain_gpt.py"), *arguments]
    return [sys.executable, "-m", "merit_ds.lab", "run", f"{name}.yaml", *given]


def lab(folder, name, output, *arguments, **options):
    return subprocess.run(
        command(name, output, *arguments, **options),
        cwd=folder,
        text=True,
        capture_output=True,
        env=environment(),
        timeout=400,
    )


def environment():
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}


def results(output):
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def attempts(run):
    return sum("start" in json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines())


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
