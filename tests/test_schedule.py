# SPDX-License-Identifier: Apache-2.0
"""Batch and schedule arithmetic, and the DeepSpeed JSON's checks: what fits, and one sentence where it does not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merit_ds.errors import InputError
from merit_ds.training.deepspeed_config import model_dtype, read_deepspeed_json
from merit_ds.training.schedule import Batch, check_scheduler, plan_batch, total_steps


def sizes(batch: object, micro: object, **more: Any) -> dict[str, Any]:
    return {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, **more}


def cosine(**params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupCosineLR", "params": params}}


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the InputError that the call raises; it is one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_steps_are_whole_steps_of_the_budget() -> None:
    assert total_steps(2_000_000_000, batch=1024, seq_length=1024) == 1907
    assert total_steps(4096 * 3, batch=4, seq_length=1024) == 3
    assert total_steps(4096 * 3 - 1, batch=4, seq_length=1024) == 2
    assert "4096 tokens" in refusal(total_steps, 4095, batch=4, seq_length=1024)


def test_accumulation_follows_from_batch_and_ranks() -> None:
    assert plan_batch(sizes(1024, 16), ranks=8) == Batch(global_batch=1024, micro_batch=16, accumulation=8)
    assert plan_batch(sizes(1024, 16), ranks=64).accumulation == 1
    assert plan_batch(sizes(64, 4, gradient_accumulation_steps=8), ranks=2).accumulation == 8


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 16))
def test_every_batch_fits_or_the_proposals_do(batch: int, micro: int, ranks: int) -> None:
    if batch % (micro * ranks) == 0:
        plan = plan_batch(sizes(batch, micro), ranks=ranks)
        assert plan.micro_batch * plan.accumulation * ranks == batch
        return
    message = refusal(plan_batch, sizes(batch, micro), ranks=ranks)
    proposals = message.partition("the nearest that fit: ")[2]
    for size in re.findall(r"\d+", re.search(r"train_batch_size ([^,]*)", proposals)[1]):
        assert abs(int(size) - batch) < micro * ranks
        plan_batch(sizes(int(size), micro), ranks=ranks)
    for size in re.findall(r"train_micro_batch_size_per_gpu (\d+)", proposals):
        plan_batch(sizes(batch, int(size)), ranks=ranks)
    counts = [int(count) for count in re.findall(r"\d+", re.search(r"([\d or]*) data-parallel|$", proposals)[0])]
    for count in range(1, batch + 1):
        fits = count in counts or any(min(count, ranks) <= found <= max(count, ranks) for found in counts)
        assert fits or batch % (micro * count), "a nearer number of ranks fits"
    for count in counts:
        plan_batch(sizes(batch, micro), ranks=count)


def test_a_batch_that_does_not_fit_is_explained() -> None:
    assert refusal(plan_batch, sizes(1000, 16), ranks=8) == (
        "train_batch_size 1000 is no multiple of train_micro_batch_size_per_gpu 16 x 8 data-parallel ranks = 128; "
        "the nearest that fit: train_batch_size 896 or 1024, or train_micro_batch_size_per_gpu 5"
    )
    assert refusal(plan_batch, sizes(1024, 16), ranks=24).endswith("or 16 or 32 data-parallel ranks")
    assert refusal(plan_batch, sizes(48, 16), ranks=4).endswith("per_gpu 12, or 3 data-parallel ranks")


@pytest.mark.parametrize("bad", [0, -4, 2.5, "auto", True, None])
def test_sizes_are_positive_integers(bad: object) -> None:
    assert "train_batch_size is" in refusal(plan_batch, sizes(bad, 4), ranks=1)
    assert "train_micro_batch_size_per_gpu is" in refusal(plan_batch, sizes(8, bad), ranks=1)


def test_a_missing_size_and_a_contradicting_accumulation_are_named() -> None:
    assert "train_micro_batch_size_per_gpu is missing" in refusal(plan_batch, {"train_batch_size": 8}, ranks=1)
    message = refusal(plan_batch, sizes(64, 4, gradient_accumulation_steps=2), ranks=2)
    assert (
        message.startswith("gradient_accumulation_steps is 2, but")
        and "2 data-parallel ranks = 8; leave the key out" in message
    )


def test_a_schedule_of_another_length_is_refused_with_both_numbers() -> None:
    check_scheduler({}, steps=100)
    check_scheduler({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 500}}}, steps=100)
    check_scheduler(cosine(total_num_steps=100, warmup_num_steps=2), steps=100)
    message = refusal(check_scheduler, cosine(total_num_steps=2000, warmup_num_steps=2), steps=1907)
    assert "2000" in message and "1907" in message and "total_num_steps" in message
    assert "None" in refusal(check_scheduler, cosine(warmup_num_steps=2), steps=1907)
    decay = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 7}}}
    assert "7, but" in refusal(check_scheduler, decay, steps=8)


@pytest.mark.parametrize("warmup", [1907, 3000])
def test_a_warmup_beyond_the_run_is_refused(warmup: int) -> None:
    message = refusal(check_scheduler, cosine(total_num_steps=1907, warmup_num_steps=warmup), steps=1907)
    assert str(warmup) in message and "2 %: 38" in message


def test_the_warmup_must_be_given() -> None:
    """DeepSpeed's default of 1000 steps would be longer than most runs."""
    assert "warmup_num_steps is missing" in refusal(check_scheduler, cosine(total_num_steps=10), steps=10)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, torch.float16),
        ({"bf16": {}}, torch.float32),
    ],
)
def test_the_models_dtype_is_the_jsons(values: dict[str, Any], dtype: torch.dtype) -> None:
    assert model_dtype(values) == dtype


def merit(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Merit", "params": params}}


@pytest.mark.parametrize(
    "values", [merit(lr=1e-3, clip=None), {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": True}}}]
)
def test_a_good_json_is_returned_as_it_is(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    assert read_deepspeed_json(path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', r":2: not valid JSON at column 7"),
        ("[1]", "is a JSON object"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"zero_optimization": {"stage": 3}}', r"zero_optimization\.stage is 3; this trainer supports 0, 1 and 2"),
        ('{"zero_optimization": {"stage": "2"}}', r"zero_optimization\.stage is '2'"),
        ('{"zero_optimization": 2}', "zero_optimization must be a JSON object, but is 2"),
        ('{"bf16": {"enabled": "auto"}}', r"bf16\.enabled must be true or false"),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "both true"),
        (json.dumps(merit(lr=1e-3, weight_dekay=0.1)), "no option 'weight_dekay'; did you mean 'weight_decay'"),
        (json.dumps(merit(lr=1e-3, params=[])), "no option 'params'"),
        (json.dumps(merit(betas=[0.9, 0.95])), r"optimizer\.params\.lr is missing"),
        (json.dumps(merit(lr=1e-3, clip=0)), r"optimizer\.params: Merit: clip=0, but it must be"),
        ("{}", r"optimizer\.type is missing"),
        ('{"sequence_parallel_size": 2}', "sequence_parallel_size: DeepSpeed would divide the ranks by it"),
        ('{"managed_gradient_accumulation": false}', "DeepSpeed would make a step of every micro-batch"),
        ('{"gradient_allreduce_op": "sum"}', "would depend on the number of ranks"),
        ('{"checkpoint": {"writer": {"type": "fast"}}}', r"checkpoint\.writer: DeepSpeed would still be writing"),
        ('{"datastates_ckpt": {}}', "datastates_ckpt: DeepSpeed would still be writing"),
        ('{"activation_checkpointing": {}}', r"set model\.activation_checkpointing in the recipe"),
        ('{"data_efficiency": {"enabled": true}}', r"data_efficiency\.enabled: this trainer reads its data by itself"),
        ('{"torch_autocast": {"enabled": true}}', r"torch_autocast\.enabled with weights in float32"),
        ('{"bfloat16": {"enabled": true}}', "bfloat16: write bf16"),
    ],
)
def test_a_bad_json_gets_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    found = refusal(read_deepspeed_json, path)
    assert found.startswith(str(path)) and re.search(message, found)


def test_an_unreadable_json_is_named(tmp_path: Path) -> None:
    assert "cannot read the DeepSpeed JSON: No such file" in refusal(read_deepspeed_json, tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    assert "not UTF-8 at byte 2" in refusal(read_deepspeed_json, tmp_path / "latin.json")
