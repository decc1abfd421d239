# SPDX-License-Identifier: Apache-2.0
"""Stopped and continued is bitwise never stopped: each of DeepSpeed's wrappers around Merit, on 2 gloo ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engine_state import assert_equal, build, slices, train, whole
from ranks import run_ranks
from zero_cases import Case

from merit_ds.training.checkpoint import load_checkpoint, save_checkpoint

SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.03, "warmup_num_steps": 6}}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CASES = [
    Case("stage0_fp32", extra=SCHEDULE),
    Case("stage0_bf16", "bf16", 3, extra=SCHEDULE),
    Case("stage0_autocast", extra=AUTOCAST),
    Case("zero1_fp32", "fp32", 3, {"stage": 1}, SCHEDULE),
    Case("zero1_bf16", "bf16", 3, {"stage": 1}, SCHEDULE),
    Case("zero2_bf16", "bf16", 3, {"stage": 2}, SCHEDULE),
    Case("zero2_round_robin", "bf16", 3, {"stage": 2, "round_robin_gradients": True}),
    Case("zero2_offload", "bf16", 3, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    Case("zero2_padded", "fp32", 3, {"stage": 2, "parameter_alignment": True}),
    Case("zero1_elastic", "fp32", 3, {"stage": 1, "elastic_checkpoint": True}, SCHEDULE),
    Case("zero2_elastic", "bf16", 3, {"stage": 2, "elastic_checkpoint": True}, SCHEDULE),
    Case("bf16_optimizer", "bf16", 3, {"stage": 1}, FP32_ACCUMULATION | SCHEDULE),
]
EXCHANGES = [
    ("zero1_bf16", "zero2_bf16"),
    ("zero2_bf16", "zero1_bf16"),
    ("zero2_bf16", "zero2_elastic"),
    ("zero2_elastic", "zero2_bf16"),
]
BY_NAME = {case.name: case for case in CASES}


def check_resume(case: Case, folder: Path) -> None:
    """Two steps, a checkpoint, two steps; against a new run that loads the checkpoint after a step of its own."""
    engine = build(case)
    train(engine, range(2))
    save_checkpoint(engine, folder, step=2, model={}, client_state={}, keep=1)
    torch.save(kept(engine), folder / f"kept_{dist.get_rank()}.pt")
    if "zero" in case.name:  # DeepSpeed's tool does not know BF16_Optimizer's shards
        check_zero_to_fp32(engine, folder)
    train(engine, range(2, 4))
    straight = kept(engine)
    engine.destroy()
    continued = build(case)
    train(continued, range(9, 10))
    load_checkpoint(continued, folder, model={})
    train(continued, range(2, 4))
    assert_equal(kept(continued), straight)
    continued.destroy()


def kept(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's part of everything that a continued run needs."""
    learning_rates = {"lr": torch.tensor(engine.get_lr(), dtype=torch.float64)}
    module = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return slices(engine) | module | learning_rates


def check_zero_to_fp32(engine: Any, folder: Path) -> None:
    """DeepSpeed's `zero_to_fp32.py` gives every float32 weight. Answers to TestZeROCheckpoint's conversions there."""
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    kept = whole(engine)
    names = {name.removesuffix(" fp32") for name in kept if name.endswith(" fp32")}
    assert names == {name for name, value in engine.module.named_parameters() if value.requires_grad and value.numel()}
    assert all(torch.equal(weights[name], kept[f"{name} fp32"]) for name in names)


def check_exchange(source: str, target: Case, root: Path) -> None:
    """ZeRO-1 and 2 load each other's checkpoints, elastic or not."""
    engine = build(target)
    load_checkpoint(engine, root / source, model={})
    assert_equal(kept(engine), torch.load(root / source / f"kept_{dist.get_rank()}.pt"))
    train(engine, range(2, 3))
    engine.destroy()


def resume_all(rank: int, root: Path) -> None:
    for case in CASES:
        check_resume(case, root / case.name)
    for source, target in EXCHANGES:
        check_exchange(source, BY_NAME[target], root)


def test_a_continued_run_is_bitwise_the_same_in_every_wrapper(tmp_path):
    """Answers to TestZeROOptimizerCheckpoint and TestZeROElasticCheckpoint in DeepSpeed's test_zero_optimizer.py."""
    run_ranks(2, resume_all, tmp_path)
