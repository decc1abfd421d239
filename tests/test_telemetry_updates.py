# SPDX-License-Identifier: Apache-2.0
"""Trust ratios, clipping and the whole weight's share, against the formula on whole weights, sharded and split."""

from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks
from tensor_parallel_cases import whole

from merit_ds import split_qkv
from merit_ds.telemetry.reduction import Reduction
from merit_ds.telemetry.updates import UpdateTotals
from merit_ds.telemetry.values import OF_UPDATES
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model, initialise_megatron
from merit_ds.training.parallel import MegatronGroups

CPU = torch.device("cpu")
LR, DECAY, CLIP, EPS, BETAS = 0.05, 0.1, 0.03, 1e-6, (0.9, 0.95)
CASES = {"stage 0": (0, 1), "ZeRO-2": (2, 1), "ZeRO-1, split": (1, 2)}


def gradient(name: str, shape: torch.Size) -> torch.Tensor:
    """The whole gradient of a parameter: near eps in size, or |u| would be the same everywhere in the first step."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 1e-6 * torch.randn(shape, generator=generator) ** 3


def observed(case: str, optimizer: dict[str, Any]) -> dict[str, Any]:
    """The first step's values, and the weights before it, put together."""
    stage, tensor_parallel = CASES[case]
    shape = ModelConfig(
        num_layers=1, hidden_size=12, num_attention_heads=2, seq_length=5, tensor_parallel=tensor_parallel
    )
    initialise_megatron(seed=1, device=CPU, tensor_parallel=tensor_parallel)
    model = build_model(shape, vocab_size=60, dtype=torch.float32, device="cpu", seed=1)
    if optimizer.pop("split", False):
        split_qkv(model)
    engine = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        mpu=MegatronGroups() if tensor_parallel > 1 else None,
        config={
            "train_batch_size": 2 // tensor_parallel,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "optimizer": optimizer,
        },
    )[0]
    before = {name: whole(p, p.detach()).numpy() for name, p in model.named_parameters() if p.requires_grad}
    totals = UpdateTotals(model, OF_UPDATES, device=CPU)
    engine.basic_optimizer.inspect = totals.add
    engine.backward(loss_with_gradients(model))
    engine.step()
    engine.basic_optimizer.inspect = None
    reduction = Reduction(CPU)
    totals.add_to(reduction)
    reduction.run(dist.group.WORLD)
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return {"values": totals.values(), "before": before}


def loss_with_gradients(model: torch.nn.Module) -> torch.Tensor:
    """Linear in the weights, with the wanted gradients."""
    terms = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        shape, axis = list(p.shape), getattr(p, "partition_dim", None)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if not getattr(p, "tensor_model_parallel", False) or ranks == 1:
            part = gradient(name, p.shape)
        else:
            shape[axis] *= ranks
            part = gradient(name, torch.Size(shape)).chunk(ranks, axis)[dist.get_rank() % ranks]
        terms.append((p * part).sum())
    return torch.stack(terms).sum()


MERIT = {"type": "Merit", "params": {"lr": LR, "weight_decay": DECAY, "clip": CLIP, "fused": False}}


def observe_all(rank: int) -> dict[str, Any]:
    found = {case: observed(case, dict(MERIT)) for case in CASES}
    found["three matrices"] = observed("ZeRO-2", MERIT | {"split": True})
    found["unbounded"] = observed(
        "ZeRO-2", {"type": "Merit", "params": MERIT["params"] | {"clip": None, "whole_bound": False}}
    )
    found["LAMB"] = observed("ZeRO-2", {"type": "MeritLAMB", "params": {"lr": LR, "weight_decay": DECAY}})
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, observe_all)


def formula(name: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of Merit's first step, in float64: the ratio of each element, its scaled update, and the whole weight's ratio."""
    w = weight.astype(np.float64)
    g = gradient(name, torch.Size(weight.shape)).numpy().astype(np.float64)
    u = (1 - BETAS[0]) * g / (np.sqrt((1 - BETAS[1]) * g * g) + EPS) + (DECAY * w if w.ndim > 1 else 0)
    size, step = np.abs(w), np.abs(u)
    bound = np.full_like(w, size.max() / step.max())
    if w.ndim == 1:
        return bound, bound * u, bound
    row = size.max(1, keepdims=True) / step.max(1, keepdims=True)
    col = size.max(0, keepdims=True) / step.max(0, keepdims=True)
    ratio = np.maximum(np.maximum(row, col), bound)
    return ratio, ratio * u, bound


@pytest.mark.parametrize("case", CASES)
def test_each_value_is_the_formulas(ranks, case):
    result = ranks[0][case]
    values, before = result["values"], result["before"]
    assert values["ratios"].keys() == values["clipped_share"].keys() == before.keys()
    assert values["whole_share"].keys() == {name for name, weight in before.items() if weight.ndim == 2}
    for name, weight in before.items():
        ratio, scaled, bound = formula(name, weight)
        assert values["ratios"][name] == pytest.approx([ratio.min(), ratio.mean(), ratio.max()], rel=1e-5), name
        assert values["clipped_share"][name] == pytest.approx((np.abs(scaled) >= CLIP).mean(), abs=1e-12), name
        if weight.ndim == 2:
            assert values["whole_share"][name] == pytest.approx((ratio == bound).mean(), abs=1e-12), name
    for value in ("clipped_share", "whole_share"):  # there is something to count
        assert sum(0.05 < share < 0.95 for share in values[value].values()) >= 2


@pytest.mark.parametrize("case", [*CASES, "three matrices", "unbounded", "LAMB"])
def test_all_ranks_find_the_same(ranks, case):
    assert ranks[0][case]["values"] == ranks[1][case]["values"]


def test_three_matrices_are_counted_under_their_parameter(ranks):
    result = ranks[0]["three matrices"]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    weight = result["before"][name]
    rows = np.arange(len(weight)).reshape(-1, 3, 6)  # of heads of 6: query, key, value
    parts, scales = [], []
    g = gradient(name, torch.Size(weight.shape)).numpy().astype(np.float64)
    for part in range(3):
        w, d = weight[rows[:, part].flatten()].astype(np.float64), g[rows[:, part].flatten()]
        u = np.abs((1 - BETAS[0]) * d / (np.sqrt((1 - BETAS[1]) * d * d) + EPS) + DECAY * w)
        size = np.abs(w)
        bound = size.max() / u.max()
        ratio = np.maximum(
            np.maximum(size.max(1, keepdims=True) / u.max(1, keepdims=True), size.max(0) / u.max(0)), bound
        )
        parts.append(ratio)
        scales.append(ratio == bound)
    ratio = np.concatenate(parts)
    assert result["values"]["ratios"][name] == pytest.approx([ratio.min(), ratio.mean(), ratio.max()], rel=1e-5)
    assert result["values"]["whole_share"][name] == pytest.approx(np.concatenate(scales).mean(), abs=1e-12)


def test_what_a_rule_leaves_out_is_left_out(ranks):
    unbounded = ranks[0]["unbounded"]["values"]
    assert not unbounded["whole_share"] and not any(unbounded["clipped_share"].values())
    lamb = ranks[0]["LAMB"]["values"]
    for low, mean, high in lamb["ratios"].values():
        assert low == high == pytest.approx(mean, rel=1e-6)
