# SPDX-License-Identifier: Apache-2.0
"""Tensor and sequence parallelism of the trainer: the same model, gradients, norm and run as without."""

import json
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from ranks import run_ranks
from tensor_parallel_cases import CONTEXT, SPLITS, Run, Split, copy_until, train_models, train_runs

from merit_ds.errors import InputError
from merit_ds.training.config import load_config
from merit_ds.training.model import build_model
from merit_ds.training.plan import make_plan
from merit_ds.training.report import flops_per_sequence

RANKS = 4
RECIPE = f"""
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: {CONTEXT}}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: alone/deepspeed.json, train_tokens: {4 * 8 * CONTEXT}, eval_interval: 2, eval_sequences: 6,
      save_interval: 2, sample_tokens: 4}}
"""
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "zero_allow_untested_optimizer": True,
    # A step changes the weights by the clipped gradient.
    "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
}
BF16 = {"bf16": {"enabled": True}}
ZERO1, ZERO2 = {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
MERIT = {"optimizer": {"type": "Merit", "params": {"lr": 0.01}}}
PAIR, SEQUENCE = Split(2), Split(2, sequence=True)
STEPS_ON_PAIRS = [
    Run("stage0", SEQUENCE),
    Run("zero1", PAIR, ZERO1),
    Run("zero2", SEQUENCE, ZERO2),
    Run("offload", PAIR, OFFLOAD),
    Run("zero2_bf16", SEQUENCE, ZERO2 | BF16),
    Run("bf16_optimizer", PAIR, ZERO1 | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    Run("llama", Split(2, llama=True), ZERO2),
    Run("llama_sequence", Split(2, sequence=True, llama=True), ZERO1),
]
RUNS = [
    Run("alone", Split(), ZERO2),
    Run("llama_alone", Split(llama=True), ZERO2),
    *STEPS_ON_PAIRS,
    Run("merit", SEQUENCE, ZERO2 | BF16 | MERIT, steps=4),
    Run("merit_continued", SEQUENCE, ZERO2 | BF16 | MERIT, steps=4, continues="merit"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with its data, and a folder with a DeepSpeed JSON for each run."""
    path = tmp_path_factory.mktemp("tensor_parallel")
    (path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(path)
    for run in RUNS:
        write_deepspeed(path / run.name, run.ds_config)
    return path


def write_deepspeed(folder: Path, changes: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED | changes))


def train_all(rank: int, folder: Path) -> dict[str, Any]:
    return {"models": train_models(), "runs": train_runs(RUNS, folder)}


@pytest.fixture(scope="module")
def ranks(folder):
    """Each rank's results; one process group serves all cases."""
    return run_ranks(RANKS, train_all, folder)


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """By name, the largest difference as a fraction of the largest expected value."""
    assert found.keys() == expected.keys()
    return {name: ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items()}


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_model_is_the_same_on_every_rank_and_split(ranks, split):
    """Initial weights bit for bit; losses and gradients but for the order of sums; the same text is drawn."""
    whole = ranks[0]["models"][split.whole()]
    for rank in ranks:
        part = rank["models"][split]
        assert all(torch.equal(part["weights"][name], weight) for name, weight in whole["weights"].items())
        torch.testing.assert_close(part["losses"], whole["losses"], rtol=1e-6, atol=0)
        assert max(relative_errors(part["gradients"], whole["gradients"]).values()) < 1e-5
        assert part["text"] == whole["text"]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_that_hold_the_same_weight_get_the_same_gradient(ranks, split):
    """Bit for bit, or their copies would drift apart."""
    first, *others = (rank["models"][split]["gradients"] for rank in ranks)
    for other in others:
        assert all(torch.equal(other[name], gradient) for name, gradient in first.items())


@pytest.mark.parametrize("run", STEPS_ON_PAIRS, ids=lambda run: run.name)
def test_a_step_clips_and_reports_as_without_a_split(folder, ranks, run):
    """TP 2 x DP 2 with accumulation against DP 4: the losses, the norm, and the clipped gradient of every weight."""
    exact = "bf16" not in run.ds_config
    alone = "llama_alone" if run.split.llama else "alone"
    expected, found = launch.metrics(folder / alone), launch.metrics(folder / run.name)
    assert [row["iteration"] for row in found] == [0, 1, 1]
    for row, reference in zip(found, expected, strict=True):
        for key in {"loss", "valid_loss"} & row.keys():
            assert row[key] == pytest.approx(reference[key], rel=1e-6 if exact else 1e-4)
    # DeepSpeed reports no norm at stage 0.
    if run.name != "stage0":
        assert expected[1]["grad_norm"] > 2 * DEEPSPEED["gradient_clipping"]
        assert found[1]["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-6 if exact else 3e-3)

    def step(result):
        return {name: result["after"][name] - before for name, before in result["before"].items()}

    # A norm's weight is near one, and its step has the rounding error of that.
    errors = relative_errors(step(ranks[0]["runs"][run.name]), step(ranks[0]["runs"][alone]))
    assert max(errors.values()) < (3e-5 if exact else 3e-2)


def test_throughput_counts_each_sequence_once_and_every_rank(folder, ranks):
    flops = flops_per_sequence(load_config(folder / "recipe.yaml").model, vocab_rows=256)
    for run in ("alone", "zero1"):
        row = launch.metrics(folder / run)[1]
        assert row["tokens_per_second"] == pytest.approx(8 * CONTEXT / row["seconds"])
        assert row["tflops_per_gpu"] * 1e12 * RANKS * row["seconds"] == pytest.approx(8 * flops)


def test_a_continued_run_is_bitwise_the_same(folder, ranks):
    launch.assert_same_run(folder / "merit_continued", folder / "merit")
    assert sorted(launch.losses(folder / "merit")) == [1, 2, 3, 4]
    for rank in ranks:
        continued, whole = rank["runs"]["merit_continued"], rank["runs"]["merit"]
        assert all(not torch.equal(continued["before"][name], weight) for name, weight in continued["after"].items())
        assert all(torch.equal(continued["after"][name], weight) for name, weight in whole["after"].items())


def refusal(folder, monkeypatch, *settings, ranks=RANKS, **ds_config):
    """The line of the InputError of a plan for some ranks."""
    (folder / "refused.json").write_text(json.dumps(DEEPSPEED | ds_config))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError) as caught:
        make_plan(
            load_config(folder / "recipe.yaml", overrides=[f"run.deepspeed={folder / 'refused.json'}", *settings])
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_split_that_does_not_fit_is_refused_in_one_line(folder, monkeypatch):
    pair = "model.tensor_parallel=2"
    assert refusal(folder, monkeypatch, pair, ranks=3) == "model.tensor_parallel 2 does not divide the 3 ranks"
    assert "2 x 3 data-parallel ranks = 6" in refusal(folder, monkeypatch, pair, ranks=6)
    assert "stage 0 with bf16" in refusal(folder, monkeypatch, pair, **BF16)
    assert "set model.tensor_parallel" in refusal(folder, monkeypatch, tensor_parallel={"autotp_size": 2})
    heads = ["model.hidden_size=36", "model.num_attention_heads=3", "model.tensor_parallel=3"]
    shape = load_config(folder / "recipe.yaml", overrides=heads).model
    with pytest.raises(InputError, match="tensor_parallel 3 does not divide the 256 rows of the vocabulary"):
        build_model(shape, vocab_size=256, dtype=torch.float32, device="cpu", seed=1)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_launcher_trains_and_continues(folder, stage, precision):
    """Four ranks of the real command, split in pairs: to the end, and again from half-way."""
    name = f"launched_{stage}_{precision}"
    zero = {"zero_optimization": {"stage": stage}} | (BF16 if precision == "bf16" else {})
    write_deepspeed(folder / name, MERIT | zero)
    split = ("--set", "model.tensor_parallel=2", "--set", f"model.sequence_parallel={str(stage == 2).lower()}")
    arguments = ("--deepspeed_config", f"{name}/deepspeed.json", *split, "--save")
    finished = launch.run(folder, *arguments, name, ranks=RANKS)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "wrapper DeepSpeedZeroOptimizer" in finished.stdout
    assert (folder / name / "sample.txt").read_text().startswith("The ")
    continued = f"{name}_continued"
    copy_until(folder / name, folder / continued, step=2)
    finished = launch.run(folder, *arguments, continued, "--load", continued, ranks=RANKS)
    assert f"continuing from step 2 in {continued}" in finished.stdout, finished.stdout + finished.stderr
    launch.assert_same_run(folder / continued, folder / name)
