# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters, whatever they are: left alone by every way in, and looked at when they are trained after all."""

import deepspeed
import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter

from merit_ds import Merit, MeritScion, MeritSophiaG, UnsupportedError


class Tower(torch.nn.Module):
    """A frozen convolution that says no matrix_view, a trained layer, and frozen codes of a quantised weight."""

    def __init__(self, codes=False):
        super().__init__()
        torch.manual_seed(0)
        self.tower = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.layer = torch.nn.Linear(4, 4)
        if codes:
            self.codes = Parameter(torch.arange(15, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return self.layer(self.tower(x).mean((2, 3))).square().sum()


def trained(stage, dtype, steps=2):
    """The layer's weight after some steps in an engine that was given all parameters."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        dtype: {"enabled": dtype == "bf16"},
    }
    # ZeRO's own buckets cannot average a model that has parameters of whole numbers.
    engine, *_ = deepspeed.initialize(model=Tower(codes=stage == 0 and dtype == "fp32"), config=config)
    images = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        engine.backward(engine(images.to(engine.module.tower.weight.dtype)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weight = engine.module.layer.weight.detach().clone()
    engine.destroy()
    return weight


def _engines(rank):
    model = Tower()
    optimizer = Merit(model.layer.parameters(), lr=0.01)
    images = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
    for stage in (0, 1, 2, 3):
        assert torch.equal(trained(stage, "fp32"), model.layer.weight), f"stage {stage}"
    assert torch.equal(trained(0, "bf16"), trained(2, "bf16"))


def test_a_tower_is_left_alone_in_an_engine_of_every_stage():
    run_ranks(2, _engines)


def _sharded(rank):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    fully_shard(model)
    optimizer = Merit(model.parameters(), lr=0.01)
    for unfrozen in (False, True):
        model[0].requires_grad_(unfrozen)
        model[0].weight.matrix_view = "flatten" if unfrozen else None
        before = [parameter.full_tensor().clone() for parameter in model.parameters()]
        model(torch.randn(1, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        moved = [not torch.equal(old, new.full_tensor()) for old, new in zip(before, model.parameters(), strict=True)]
        assert moved == [unfrozen, unfrozen, True, True]


def test_a_frozen_dtensor_is_left_alone_until_it_is_trained():
    run_ranks(2, _sharded)


@pytest.mark.parametrize(
    ("odd", "message"), [(torch.ones(2, 3, 3, 3), "matrix_view None"), (torch.ones(3, 3).double(), "torch.float64")]
)
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_trained_after_all_is_checked_then(odd, message, fused):
    frozen, weight = Parameter(odd, requires_grad=False), Parameter(torch.ones(2, 2))
    optimizer = Merit([frozen, weight], lr=0.01, fused=fused)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert frozen not in optimizer.state
    frozen.requires_grad_()
    frozen.grad, before = torch.ones_like(frozen), weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert torch.equal(weight, before) and optimizer.state[weight]["step"] == 1
    with pytest.raises(ValueError, match=message):
        Merit([frozen], lr=0.01)


def test_what_is_trained_after_all_takes_its_steps():
    frozen, weight = Parameter(torch.ones(2, 3, 3), requires_grad=False), Parameter(torch.ones(2, 2))
    other = Parameter(torch.ones(2, 3, 3))
    optimizer, alone = Merit([frozen, weight], lr=0.01), Merit([{"params": [other], "matrix_view": "stack"}], lr=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    frozen.requires_grad_()
    frozen.matrix_view = "stack"
    frozen.grad, other.grad = torch.ones_like(frozen), torch.ones_like(frozen)
    optimizer.step()
    alone.step()
    assert torch.equal(frozen, other)
    assert [optimizer.state[tensor]["step"] for tensor in (frozen, weight)] == [1, 2]


def test_a_frozen_weight_of_other_strides_is_left_alone():
    frozen = Parameter(torch.ones(3, 4).t(), requires_grad=False)
    weight = Parameter(torch.ones(2, 2))
    weight.grad = torch.ones_like(weight)
    optimizer = MeritScion([frozen, weight], lr=0.01)
    optimizer.step()
    frozen.requires_grad_()
    with pytest.raises(UnsupportedError, match="contiguous"):
        optimizer.step()


def test_sophia_keeps_no_moments_of_what_is_frozen():
    frozen, weight = Parameter(torch.ones(50, 50), requires_grad=False), Parameter(torch.ones(2, 2))
    optimizer = MeritSophiaG([frozen, weight], lr=0.01)
    optimizer.update_hessian([torch.ones(2, 2)], examples=1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert list(optimizer.state) == [weight]
    frozen.requires_grad_()
    optimizer.update_hessian([torch.ones(50, 50), torch.ones(2, 2)], examples=1)
    assert optimizer.state[frozen]["exp_avg_sq"].all()
