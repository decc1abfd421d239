# SPDX-License-Identifier: Apache-2.0
"""torch's hooks around `load_state_dict`: what they make of a state counts, and what they see is the state."""

import copy

import pytest
import torch
from torch.nn import Parameter

from merit_ds import Merit, MeritW


def weight(rows=4, cols=4, *, seed=0, dtype=torch.float32):
    return Parameter(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype))


def stepped(optimizer):
    """The optimizer after a step in which each weight has its own gradient, all of one number."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for number, tensor in enumerate(tensors):
        tensor.grad = torch.full_like(tensor, number + 1.0)
    optimizer.step()
    return optimizer


def by_name(optimizer, state):
    """The pre-hook of torch's documentation: the saved states in the order of this optimizer's names."""
    (group,), (saved,) = optimizer.param_groups, copy.deepcopy(state["param_groups"])
    states = {new: state["state"][saved["param_names"].index(name)] for new, name in enumerate(group["param_names"])}
    return {"state": states, "param_groups": [saved | {"param_names": list(group["param_names"])}]}


def test_a_pre_hook_may_reorder_a_state_by_its_names():
    first, second = weight(), weight(seed=1)
    state = stepped(Merit([("first", first), ("second", second)], lr=0.01)).state_dict()
    optimizer = Merit([("second", second), ("first", first)], lr=0.01)
    optimizer.register_load_state_dict_pre_hook(by_name)
    optimizer.load_state_dict(state)
    for tensor, number in ((first, 0), (second, 1)):
        assert torch.equal(optimizer.state[tensor]["exp_avg"], state["state"][number]["exp_avg"])


def test_a_pre_hook_may_pad_a_state_of_fewer_rows():
    state = copy.deepcopy(stepped(Merit([weight(4)], lr=0.01)).state_dict())

    def pad(_, saved):
        for name in ("exp_avg", "exp_avg_sq"):
            saved["state"][0][name] = torch.cat([saved["state"][0][name], torch.zeros(2, 4)])

    grown = weight(6)
    optimizer = Merit([grown], lr=0.01)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) and its parameter \(6, 4\)"):
        optimizer.load_state_dict(state)
    optimizer.register_load_state_dict_pre_hook(pad)
    optimizer.load_state_dict(state)
    assert optimizer.state[grown]["exp_avg"][:4].all() and not optimizer.state[grown]["exp_avg"][4:].any()


def test_a_state_that_a_pre_hook_spoils_is_refused_and_nothing_changes():
    tensor = weight()
    optimizer = stepped(Merit([tensor], lr=0.01))
    state, before = copy.deepcopy(optimizer.state_dict()), optimizer.state[tensor]["exp_avg"].clone()
    spoil = optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["param_groups"][0].update(clip=-3))
    with pytest.raises(ValueError, match="clip=-3"):
        optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.param_groups[0]["clip"] == 1.0 and torch.equal(optimizer.state[tensor]["exp_avg"], before)
    spoil.remove()
    optimizer.load_state_dict(state)  # the refusal has left nothing behind


def test_a_post_hook_sees_what_was_restored_and_may_change_it():
    tensor = weight(dtype=torch.bfloat16)
    optimizer = stepped(Merit([tensor], lr=0.01))
    state, seen = copy.deepcopy(optimizer.state_dict()), []

    def look_and_empty(loaded):
        seen.append(loaded.state[tensor]["exp_avg"].clone())
        loaded.state[tensor]["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(look_and_empty)
    optimizer.load_state_dict(state)
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], state["state"][0]["exp_avg"])
    assert not optimizer.state[tensor]["exp_avg"].any()
    optimizer.step()


def test_merit_w_takes_a_state_that_a_pre_hook_has_made_its_own():
    tensor = weight()
    state = stepped(Merit([tensor], lr=0.01)).state_dict()
    optimizer = MeritW([tensor], lr=0.01)
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["param_groups"][0].update(elementwise=False))
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.state[tensor]["step"] == 1
