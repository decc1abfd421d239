# SPDX-License-Identifier: Apache-2.0
"""A tiny recipe for two ranks, and what its ranks need in their environment."""

import json
import os
import sys
from pathlib import Path

from hosts import environment
from launch import prepare_text

from merit_ds.training.cpu_comm import _build_folder, _builder

RECIPE = """
model: {{num_layers: 2, hidden_size: 36, num_attention_heads: 3, seq_length: 32}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: recipe.json, train_tokens: {tokens}, eval_interval: 1000, eval_sequences: 6, save_interval: 30}}
"""
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}
VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "TORCH_EXTENSIONS_DIR": str(_build_folder(_builder()).parent),
}
"""What does not travel to other hosts by itself; a user's .deepspeed_env has such lines."""


def write_recipe(folder: Path, *, steps: int) -> None:
    """recipe.yaml, recipe.json, its data and a .deepspeed_env."""
    (folder / "recipe.yaml").write_text(RECIPE.format(tokens=steps * 8 * 32))
    (folder / "recipe.json").write_text(json.dumps(DEEPSPEED))
    (folder / ".deepspeed_env").write_text(environment(VARIABLES))
    prepare_text(folder)
