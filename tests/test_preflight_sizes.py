# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint takes, as the preflight thinks: parameters and moments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import megatron_alone
from preflight_case import DEEPSPEED, write_case
from test_recipes import CONFIGS, LARGE_SCALE

from merit_ds.preflight.sizes import checkpoint_bytes, parameter_count
from merit_ds.training.config import Config, load_config, padded_vocab
from merit_ds.training.model import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load_config(folder / "recipe.yaml")


@pytest.mark.parametrize("name", LARGE_SCALE)
def test_a_recipe_s_parameters_are_counted(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    parameters = parameter_count(config, vocab_size=50257)
    assert parameters == LARGE_SCALE[name][0]
    assert checkpoint_bytes(config, vocab_size=50257) == 14 * parameters  # bf16, and three float32


@pytest.mark.parametrize(("kind", "numbers"), [("Merit", 4), ("MeritLion", 3), ("lion", 3), ("OneBitAdam", 4)])
def test_a_checkpoint_has_the_moments_of_its_optimizer(kind: str, numbers: int, config: Config, tmp_path: Path) -> None:
    optimizer = {"optimizer": {"type": kind, "params": {"lr": 0.01}}}
    (tmp_path / "recipe.json").write_text(json.dumps(DEEPSPEED | optimizer))
    run = config.run.model_copy(update={"deepspeed": str(tmp_path / "recipe.json")})
    config = config.model_copy(update={"run": run})
    wanted = 4 * numbers * parameter_count(config, vocab_size=257)  # float32: weights, master weights, moments
    assert checkpoint_bytes(config, vocab_size=257) == wanted


def test_every_kind_of_model_is_counted(config: Config) -> None:
    kinds: list[dict[str, Any]] = [
        {"qk_norm": True},
        {"norm": "rmsnorm", "qk_norm": True, "activation": "swiglu", "positions": "rotary", "ffn_hidden_size": 50},
        {"tied_embeddings": False},
    ]
    with megatron_alone():
        for kind in kinds:
            model = config.model.model_copy(update=kind)
            built = build_model(model, vocab_size=257, dtype=torch.float32, device="meta", seed=1)
            expected = sum(p.numel() for p in built.parameters() if p.requires_grad)
            assert parameter_count(config.model_copy(update={"model": model}), vocab_size=257) == expected
    assert padded_vocab(257, multiple=config.model.vocab_multiple) == 384
