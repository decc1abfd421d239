# SPDX-License-Identifier: Apache-2.0
"""The real `pretrain_gpt.py` under DeepSpeed's real launcher, on real text, and what its runs leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from ranks import free_port

REPOSITORY = Path(__file__).parent.parent
PORT = free_port()


def prepare_text(folder):
    """Real English, from the licence, as `data` in the folder."""
    text = str(REPOSITORY / "LICENSE")
    command = ["-m", "merit_ds.training.data", "text", text, "--output", "data", "--tokenizer", "byte"]
    subprocess.run([sys.executable, *command, "--blank-lines", "--valid-fraction", "0.2"], cwd=folder, check=True)


def command(*arguments, ranks=2):
    """Of a run of `recipe.yaml`; of plain python where `ranks` is 0."""
    script = [str(REPOSITORY / "pretrain_gpt.py"), "--config", "recipe.yaml", *arguments]
    if ranks == 0:
        return [sys.executable, *script]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", str(ranks), "--master_port", str(PORT), *script]


def environment():
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(folder, *arguments, ranks=2):
    """Run to the end; returns the finished process with its output as text."""
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=folder, env=environment(), text=True, capture_output=True, timeout=300
    )


def metrics(save):
    path = save / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def losses(save):
    """iteration -> training loss, as rank 0 wrote them."""
    return {row["iteration"]: row["loss"] for row in metrics(save) if "loss" in row}


def shards(save):
    """Every tensor of the newest checkpoint, by file and path within it."""
    found = {}

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                walk(f"{name}/{index}", inner)

    for path in sorted((save / (save / "latest").read_text()).glob("*.pt")):
        walk(path.name, torch.load(path, weights_only=False))
    return found


def assert_same_run(ours, reference):
    """Bitwise: every loss, and every tensor of the last checkpoint, weights and optimizer state alike."""
    assert losses(ours) == losses(reference)
    expected, found = shards(reference), shards(ours)
    assert expected and found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different
