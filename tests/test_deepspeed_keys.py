# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed itself makes of a JSON: a key that it ignores, and one that makes it do other steps."""

import logging
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from engine_state import message
from ranks import run_ranks

from merit_ds.errors import InputError
from merit_ds.training.config import Config
from merit_ds.training.deepspeed_keys import check_keys, known_keys
from merit_ds.training.plan import plan_of
from merit_ds.training.setup import wrap

RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32},
    "data": {"prefix": "data", "tokenizer": "byte"},
    "run": {"deepspeed": "ds.json", "train_tokens": 2560},
}
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}


def test_deepspeed_s_reader_says_what_it_looks_for() -> None:
    known = known_keys()
    assert {"zero_optimization", "gradient_clipping", "scheduler", "wandb", "wall_clock_breakdown", "fp16"} <= known
    assert "zero_optimisation" not in known and "stage" not in known


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("schedular", "scheduler"),
        ("BF16", "bf16"),
    ],
)
def test_a_misspelt_key_is_refused(key: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"ds.json: DeepSpeed has no key '{key}' .*; did you mean '{meant}'"):
        check_keys(DEEPSPEED | {key: {}}, path="ds.json")


def test_other_keys_that_deepspeed_ignores_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    ds_config = DEEPSPEED | {"_comment": "of ours", "wall_clock_breakdown": False, "cluster": "ours", "owner": "me"}
    check_keys(ds_config, path="ds.json", quiet=True)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        check_keys(ds_config, path="ds.json")
    assert caplog.messages == ["ds.json: DeepSpeed does not know these keys, and ignores them: cluster, owner"]


@pytest.mark.parametrize(
    ("said", "enabled"),
    [({}, False), ({"timers": {"throughput": {"enabled": True}}}, True), ({"steps_per_print": 10}, True)],
)
def test_deepspeed_s_timer_waits_for_the_device_only_where_its_number_is_wanted(
    said: dict[str, Any], enabled: bool
) -> None:
    plan = plan_of(Config.model_validate(RECIPE), DEEPSPEED | said, world=1)
    assert DeepSpeedConfig(plan.ds_config).timers_config.enabled == enabled


def divide_the_ranks(rank: int) -> str:
    """A JSON that the checks beforehand have not seen."""
    ds_config = DEEPSPEED | {"sequence_parallel_size": 2}
    plan = plan_of(Config.model_validate(RECIPE), ds_config, world=2, rank=rank, local_rank=rank)
    return message(lambda: wrap(plan, torch.nn.Linear(4, 4)))


def test_an_engine_that_would_do_other_steps_is_refused() -> None:
    for line in run_ranks(2, divide_the_ranks):
        assert "ds.json: DeepSpeed makes 4 micro-batches a step of it, where this trainer has 2: remove" in line
