# SPDX-License-Identifier: Apache-2.0
"""Merit's state in plain PyTorch: saved, loaded, refused, emptied, copied."""

import copy
import pickle

import pytest
import torch
from optimizer_case import SETTINGS, expected, gradient, parameter, train

from merit_ds import Merit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_bitwise_and_float32(dtype):
    weight = parameter(8, 9, dtype=dtype)
    straight = torch.nn.Parameter(weight.detach().clone())
    train(Merit([straight], **SETTINGS), [straight], steps=range(6))
    first = Merit([weight], **SETTINGS)
    train(first, [weight], steps=range(3))
    second = Merit([weight], **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    state = second.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert state["step"] == second.param_groups[0]["step"] == 3
    train(second, [weight], steps=range(3, 6))
    assert torch.equal(weight, straight)


def test_foreign_state_is_refused_and_nothing_changes():
    weight = parameter(8, 9)
    optimizer = Merit([weight], **SETTINGS)
    train(optimizer, [weight])
    before = copy.deepcopy(optimizer.state_dict())
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match="not Merit's optimizer state"):
        optimizer.load_state_dict(sgd.state_dict())
    adamw = torch.optim.AdamW([weight], lr=0.1)
    adamw.step()
    with pytest.raises(ValueError, match="not Merit's optimizer state: its groups have no clip"):
        optimizer.load_state_dict(adamw.state_dict())
    spoilt = copy.deepcopy(before)
    spoilt["param_groups"][0]["clip"] = -3
    with pytest.raises(ValueError, match="Merit: clip=-3"):
        optimizer.load_state_dict(spoilt)
    other = parameter(9, 8)
    source = Merit([other], **SETTINGS)
    train(source, [other])
    with pytest.raises(ValueError, match=r"exp_avg has shape \(9, 8\) and its parameter \(8, 9\)"):
        optimizer.load_state_dict(source.state_dict())
    assert torch.equal(optimizer.state[weight]["exp_avg"], before["state"][0]["exp_avg"])


def test_a_state_without_its_count_is_refused_and_nothing_changes():
    weight = parameter(4, 5)
    optimizer = Merit([weight], **SETTINGS)
    train(optimizer, [weight])
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["step"]
    with pytest.raises(ValueError, match=r"not Merit's optimizer state: it has .* and no step"):
        optimizer.load_state_dict(state)
    assert optimizer.state[weight]["step"] == 4


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_that_was_emptied_is_made_anew(fused):
    weight, idle, straight = parameter(4, 5), parameter(3), parameter(4, 5)
    optimizer = Merit([weight, idle], fused=fused, **SETTINGS)
    train(optimizer, [weight], steps=range(2))
    optimizer.state[weight].clear()
    straight.data = weight.detach().clone()
    train(optimizer, [weight], steps=range(2, 4))
    train(Merit([straight], fused=fused, **SETTINGS), [straight], steps=range(2, 4))
    assert torch.equal(weight, straight)
    assert optimizer.state[weight]["step"] == 2 and idle not in optimizer.state


def test_a_state_can_be_loaded_again():
    """Back to an earlier state, as after a bad step; the copy has been unpickled, which counts as loading."""
    weight = parameter(4, 5)
    optimizer = Merit([weight], **SETTINGS)
    train(optimizer, [weight], steps=range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for loading in (optimizer, optimizer, pickle.loads(pickle.dumps(optimizer))):
        loading.load_state_dict(copy.deepcopy(saved))
        assert torch.equal(next(iter(loading.state.values()))["exp_avg"], saved["state"][0]["exp_avg"])


def test_copies_and_pickles_go_on_stepping():
    weight = parameter(4, 5)
    straight = expected(weight, steps=range(4))
    optimizer = Merit([weight], **SETTINGS)
    train(optimizer, [weight], steps=range(2))
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (twin,) = clone.param_groups[0]["params"]
        train(clone, [twin], steps=range(2, 4))
        assert torch.equal(twin, straight)


@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_step_is_the_plain_one(fused):
    """After steps that were not compiled, whose gradients are remembered by weak references."""
    weights, others = ([parameter(6, 5, seed=seed) for seed in (0, 1)] for _ in range(2))
    optimizer, plain = (Merit(each, fused=fused, **SETTINGS) for each in (weights, others))
    train(optimizer, weights, steps=range(2))
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        compiled()  # the gradients stay as they are
    for step in range(2, 5):
        for index, weight in enumerate(weights):
            weight.grad = gradient(weight.shape, step=step, seed=index)
        compiled()
    train(plain, others, steps=[0, 1, 1, 1, 1, 2, 3, 4])
    assert all(map(torch.equal, weights, others))
    assert [optimizer.state[weight]["step"] for weight in weights] == [8, 8]
