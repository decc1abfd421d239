# SPDX-License-Identifier: Apache-2.0
"""`MeritSophiaG` in the trainer: the Hessian that it keeps, on every sharding, and continued runs."""

import json
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from alone import megatron_alone
from ranks import run_ranks
from tensor_parallel_cases import CONTEXT, Run, Split, train_runs

from merit_ds.training.config import load_config
from merit_ds.training.dataset import open_datasets
from merit_ds.training.gauss_newton import sampled_gradients
from merit_ds.training.model import build_model
from merit_ds.training.tokenizer import build_tokenizer
from merit_ds.training.universal import make_universal

STEPS, BATCH, SEQUENCES, BETA2 = 4, 8, 5, 0.9
RECIPE = f"""
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: {CONTEXT}}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: none.json, train_tokens: {STEPS * BATCH * CONTEXT}, eval_interval: 100, eval_sequences: 6,
      save_interval: 2}}
"""
OPTIONS = {"lr": 1e-3, "betas": [0.8, BETA2], "hessian_interval": 2, "hessian_sequences": SEQUENCES}
DEEPSPEED = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "MeritSophiaG", "params": OPTIONS},
}
ZERO1, ZERO2 = {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}}
RUNS = [
    Run("whole", Split(), steps=STEPS),
    Run("zero1", Split(), ZERO1, steps=STEPS),
    Run("zero2", Split(), ZERO2, steps=STEPS),
    Run("tensor", Split(2, sequence=True), ZERO1, steps=STEPS),
    Run("zero2_again", Split(), ZERO2, steps=STEPS, continues="zero2"),
    Run("first", Split(), ZERO2, steps=1),
]


def train_all(rank: int, folder: Path) -> dict[str, Any]:
    return train_runs(RUNS, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sophia")
    (path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(path)
    for run in RUNS:
        (path / run.name).mkdir()
        (path / run.name / "deepspeed.json").write_text(json.dumps(DEEPSPEED | run.ds_config))
    return path


@pytest.fixture(scope="module")
def trained(folder):
    return run_ranks(2, train_all, folder)[0]


def test_the_first_hessian_is_that_of_one_rank(folder, trained):
    """(1 - beta2) * tokens * g * g in the checkpoint, of each parameter put together from its shards."""
    universal = make_universal(folder / "first")
    config = load_config(folder / "recipe.yaml", overrides=[f"data.prefix={folder / 'data'}"])
    # One step's sequences are another order than four steps'.
    samples, tokenizer = {"train_samples": BATCH, "valid_samples": 6}, build_tokenizer("byte")
    train, _ = open_datasets(config.data, seq_length=CONTEXT, seed=1234, **samples, tokenizer=tokenizer)
    with megatron_alone():
        model = build_model(config.model, vocab_size=256, dtype=torch.float32, device="cpu", seed=1234)
        arguments = {"start": 0, "stop": SEQUENCES, "micro_batch": 2, "vocab_size": 256, "seed": 1234}
        gradients, tokens = sampled_gradients(model, train, **arguments, device=torch.device("cpu"))
    assert tokens == SEQUENCES * CONTEXT
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, gradients, strict=True):
        found = torch.load(universal / "zero" / name / "exp_avg_sq.pt", weights_only=False)["param"]
        expected = (1 - BETA2) * tokens * gradient.square()
        assert (found.view_as(expected) - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["zero1", "zero2", "tensor"])
def test_the_run_is_that_without_sharding(folder, trained, name):
    """But for the order of sums, which flips the sign of a step where momentum and Hessian both vanish."""
    whole = trained["whole"]
    for parameter, weight in whole["after"].items():
        change = weight - whole["before"][parameter]
        assert (trained[name]["after"][parameter] - weight).norm() < 1e-2 * change.norm(), parameter
    losses = [launch.losses(folder / run) for run in (name, "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1][STEPS] < losses[1][1]


def test_a_continued_run_is_bitwise_the_same(folder, trained):
    launch.assert_same_run(folder / "zero2_again", folder / "zero2")
