# SPDX-License-Identifier: Apache-2.0
"""Every recipe under configs/: valid, of the sizes that it says, and the same run on any of the usual GPU counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alone import megatron_alone
from deepspeed.runtime.config import DeepSpeedConfig

from merit_ds.training.config import Config, load_config
from merit_ds.training.deepspeed_config import model_dtype, read_deepspeed_json
from merit_ds.training.deepspeed_keys import check_keys
from merit_ds.training.model import build_model
from merit_ds.training.schedule import check_scheduler, plan_batch, total_steps

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL, MEDIUM, LARGE = 124_373_760, 354_599_936, 773_582_080

# Recipe: trainable parameters, sequences of a step, steps, peak learning rates by optimizer.
PAPER = {
    "gpt2_small_1k": (SMALL, 1024, 1907, {"Merit": 9e-3, "AdamW": 1e-3}),
    "gpt2_medium_4k": (MEDIUM, 4096, 1907, {"Merit": 9e-3, "AdamW": 4e-3}),
    "gpt2_large_8k": (LARGE, 8192, 1907, {"Merit": 6e-3, "AdamW": 2e-3}),
    "gpt2_small_4k_48b": (SMALL, 4096, 11444, {"Merit": 9e-3}),
    "gpt2_medium_6k_48b": (MEDIUM, 6144, 7629, {"Merit": 9e-3}),
}
# Batch and tokens are the paper's; the shapes and the learning rates are ours.
LLAMA = {
    "llama_130m_1k": (123_587_328, 1024, 2479, {"Merit": 9e-3, "AdamW": 1e-3}),
    "llama_350m_4k": (350_405_632, 4096, 1907, {"Merit": 9e-3, "AdamW": 4e-3}),
}
LARGE_SCALE = PAPER | LLAMA


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    with megatron_alone():
        yield


def deepspeed_files(recipe: str) -> list[Path]:
    return [path for path in (CONFIGS / f"{recipe}.json", CONFIGS / f"{recipe}_adamw.json") if path.exists()]


def steps_of(recipe: Config, *, batch: int) -> int:
    return total_steps(recipe.run.train_tokens, batch=batch, seq_length=recipe.model.seq_length)


def test_the_folder_holds_nothing_that_is_not_tested_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*LARGE_SCALE, "quickstart"}
    tested = [path for recipe in (*LARGE_SCALE, "quickstart") for path in deepspeed_files(recipe)]
    assert sorted(CONFIGS.glob("*.json")) == sorted(tested)


@pytest.mark.parametrize("name", LARGE_SCALE)
def test_a_recipe_is_what_it_says(name: str) -> None:
    parameters, sequences, steps, rates = LARGE_SCALE[name]
    recipe = load_config(CONFIGS / f"{name}.yaml")
    assert recipe.model.seq_length == 1024
    assert Path(recipe.run.deepspeed) == CONFIGS / f"{name}.json"
    found = {}
    for path in deepspeed_files(name):
        ds_config = read_deepspeed_json(path)
        assert ds_config["train_batch_size"] == sequences
        assert model_dtype(ds_config) == torch.bfloat16
        assert steps_of(recipe, batch=sequences) == steps
        options = ds_config["optimizer"]["params"]
        assert (options["betas"], options["weight_decay"], ds_config["gradient_clipping"]) == ([0.9, 0.95], 0.1, 1.0)
        found[ds_config["optimizer"]["type"]] = options["lr"]
    assert found == rates
    model = build_model(recipe.model, vocab_size=50257, dtype=torch.bfloat16, device="meta", seed=recipe.run.seed)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert all(p.device.type == "meta" for p in model.parameters())
    head = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"{parameters / 1e6:.1f} M trainable parameters" in head and f"= {steps} steps" in head
    assert ("all of these are ours" in head) == (name in LLAMA)


@pytest.mark.parametrize("name", [*LARGE_SCALE, "quickstart"])
def test_the_schedule_follows_from_the_tokens(name: str) -> None:
    recipe = load_config(CONFIGS / f"{name}.yaml")
    for path in deepspeed_files(name):
        ds_config = read_deepspeed_json(path)
        steps = steps_of(recipe, batch=ds_config["train_batch_size"])
        check_scheduler(ds_config, steps=steps)
        assert ds_config["scheduler"]["type"] == "WarmupCosineLR"
        params = ds_config["scheduler"]["params"]
        # The paper's share; the quickstart's few steps need a longer warm-up.
        assert params["warmup_num_steps"] == round(steps / (50 if name in LARGE_SCALE else 20))
        assert (params["warmup_type"], params["cos_min_ratio"]) == ("linear", 0.1)


@pytest.mark.parametrize("ranks", [8, 16, 64])
@pytest.mark.parametrize("name", LARGE_SCALE)
def test_the_batch_fits_any_usual_gpu_count(name: str, ranks: int) -> None:
    for path in deepspeed_files(name):
        ds_config = read_deepspeed_json(path)
        assert "gradient_accumulation_steps" not in ds_config
        batch = plan_batch(ds_config, ranks=ranks)
        assert batch.micro_batch * batch.accumulation * ranks == batch.global_batch == LARGE_SCALE[name][1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_quickstart_runs_on_one_or_two_processes(ranks: int) -> None:
    recipe = load_config(CONFIGS / "quickstart.yaml")
    ds_config = read_deepspeed_json(Path(recipe.run.deepspeed))
    batch = plan_batch(ds_config, ranks=ranks)
    assert batch.accumulation * batch.micro_batch * ranks == batch.global_batch
    assert ds_config["zero_optimization"]["stage"] == 2
    # Its schedule gives two steps without a learning rate: a run of a few steps would train nothing.
    assert steps_of(recipe, batch=batch.global_batch) > 100


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_reads_the_json_as_meant(path: Path) -> None:
    ds_config = read_deepspeed_json(path)
    read = DeepSpeedConfig(ds_config)
    assert read.zero_optimization_stage == ds_config["zero_optimization"]["stage"]
    assert read.gradient_accumulation_steps == plan_batch(ds_config, ranks=1).accumulation
    assert read.bfloat16_config.enabled == (model_dtype(ds_config) == torch.bfloat16)
    assert read.scheduler_params == ds_config["scheduler"]["params"]
    check_keys(ds_config, path=str(path))
