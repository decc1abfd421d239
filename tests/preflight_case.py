# SPDX-License-Identifier: Apache-2.0
"""A recipe with its data, for the preflight's tests, and the preflight as a command."""

import json
import subprocess
import sys
from pathlib import Path

from launch import environment, prepare_text

RECIPE = """
model: {num_layers: 2, hidden_size: 36, num_attention_heads: 3, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: recipe.json, train_tokens: 10240, save: runs/recipe}
"""
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}


def write_case(path: Path) -> Path:
    """Write `recipe.yaml`, its JSON and the data into the folder."""
    (path / "recipe.yaml").write_text(RECIPE)
    (path / "recipe.json").write_text(json.dumps(DEEPSPEED))
    prepare_text(path)
    return path


def run(folder: Path, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *arguments]
    variables = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True, timeout=300)
