# SPDX-License-Identifier: Apache-2.0
"""The baselines as optimizers: saved states, settings, steps that are left out, a look into a step."""

import copy
import functools

import pytest
import torch
from baseline_cases import BASELINES, STEPS, gradients, model, train

import merit_ds
from merit_ds import Merit, MeritLAMB, MeritLARS, MeritLion, MeritMaxLAMB, MeritScion, MeritSophiaG, MeritW
from merit_ds.errors import UnsupportedError


@pytest.mark.parametrize("kind", BASELINES)
def test_a_saved_state_goes_on_bitwise(kind):
    straight, stopped = model(), model()
    train(kind(straight, 0.01), straight)
    first = kind(stopped, 0.01)
    train(first, stopped, steps=range(2))
    second = kind(stopped, 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, stopped, steps=range(2, STEPS))
    assert all(torch.equal(one, other) for one, other in zip(straight, stopped, strict=True))
    assert second.param_groups[0]["step"] == STEPS


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MeritLAMB, {"bias_correction": 1}, "bias_correction=1"),
        (MeritLARS, {"momentum": 1.0}, "momentum=1.0"),
        (MeritSophiaG, {"hessian_interval": 0.5}, "hessian_interval=0.5"),
        (MeritScion, {"radius": 0}, "radius=0"),
        (MeritScion, {"alpha": 0.0}, "alpha=0.0"),
        (Merit, {"norm": "l1"}, "norm='l1'"),
        (Merit, {"whole_bound": None}, "whole_bound=None"),
    ],
)
def test_bad_settings_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(model(), 0.01, **settings)


def test_every_type_is_registered():
    for kind in (Merit, *BASELINES):
        assert getattr(torch.optim, kind.__name__) is kind is getattr(merit_ds, kind.__name__)


def test_a_step_that_is_left_out_does_not_count_for_the_correction():
    weights, straight = model(), model()
    optimizer = MeritLAMB(weights, 0.02)
    for flag in (1.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(flag)
        train(optimizer, weights, steps=[0])
    train(MeritLAMB(straight, 0.02), straight, steps=[0])
    assert all(torch.equal(one, other) for one, other in zip(weights, straight, strict=True))


def test_a_weight_without_a_gradient_keeps_its_own_count():
    first, second = model()[:2]
    optimizer = MeritLAMB([first, second], 0.02)
    for step in range(3):
        first.grad = gradients([first], step)[0]
        second.grad = gradients([second], 2)[0] if step == 2 else None
        optimizer.step()
    alone = model()[1]
    alone.grad = gradients([alone], 2)[0]
    MeritLAMB([alone], 0.02).step()
    assert torch.equal(second, alone)


@pytest.mark.parametrize(("kind", "lr"), [(MeritLARS, 1.0), (MeritLAMB, 0.02), (MeritSophiaG, 0.01), (MeritLion, 0.01)])
def test_a_look_into_the_step_shows_what_is_applied(kind, lr):
    """The change of a weight is lr * ratio * update, as observed; LARS without momentum."""
    weight = model()[0]
    optimizer = kind([weight], lr, **({"momentum": 0.0} if kind is MeritLARS else {}))
    train(optimizer, [weight], steps=[0])
    seen = []
    optimizer.inspect = lambda pieces: seen.extend(piece._replace(weight=piece.weight.clone()) for piece in pieces)
    before = weight.detach().clone()
    train(optimizer, [weight], steps=[1])
    (piece,) = seen
    assert torch.equal(piece.weight, before) and piece.owner is weight
    torch.testing.assert_close(weight.detach(), before - lr * piece.ratio * piece.update)


def test_scion_refuses_a_look_and_goes_on_without():
    weights = model()
    optimizer = MeritScion(weights, 0.01)
    optimizer.inspect = print
    with pytest.raises(UnsupportedError, match="no trust ratios"):
        train(optimizer, weights, steps=[0])
    optimizer.inspect = None
    train(optimizer, weights, steps=[0])


def test_torchs_way_to_create_state_is_no_step_without_an_estimate():
    """torch.distributed.checkpoint.state_dict steps with zero gradients and lr 0 before it loads a state."""
    weights = model()
    optimizer = MeritSophiaG(weights, 0.0)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(weights, model(), strict=True))


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        (MeritW, Merit, "elementwise=True"),
        (MeritLion, Merit, "has exp_avg_sq"),
        (Merit, MeritLion, "no betas|no clip|no exp_avg_sq"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(kind, other, message):
    weights = model()
    saved = other(weights, 0.01)
    train(saved, weights, steps=[0])
    state = saved.state_dict()
    if kind is MeritLion:
        state["param_groups"] = MeritLion(weights, 0.01).state_dict()["param_groups"]
    with pytest.raises(ValueError, match=message):
        kind(weights, 0.01).load_state_dict(state)


@pytest.mark.parametrize(
    ("group", "message"),
    [({"norm": "l2"}, "norm is one for all groups"), ({"elementwise": False, "whole_bound": False}, "both False")],
)
def test_groups_that_would_be_taken_otherwise_than_meant_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        Merit([{"params": model(), **group}], 0.01)
    if "norm" not in group:
        return
    with pytest.raises(ValueError, match="elementwise=True"):
        MeritW([{"params": model(), "elementwise": True}], 0.01)


@pytest.mark.parametrize(
    ("kind", "group", "message"),
    [
        (MeritScion, {"weight_decay": 0.1}, "weight_decay=0.1, and MeritScion has no weight_decay"),
        (MeritLion, {"clip": 1.0}, "clip=1.0, and MeritLion has no clip"),
        (MeritLAMB, {"elementwise": True}, "elementwise=True, and MeritLAMB has no elementwise"),
        (MeritLAMB, {"whole_bound": False}, "whole_bound=False, and MeritLAMB has no whole_bound"),
        (Merit, {"sign_update": True}, "sign_update=True, and Merit has no sign_update"),
        (MeritScion, {"no_trust_ratio": True}, "no_trust_ratio=True, and MeritScion has no no_trust_ratio"),
        (MeritLion, {"no_trust_ratio": True}, "no_trust_ratio=True, and MeritLion has no no_trust_ratio"),
        (Merit, {"maximize": True}, "maximize=True, and Merit has no maximize"),
        (Merit, {"amsgrad": True}, "amsgrad=True, and Merit has no amsgrad"),
        (MeritLARS, {"nesterov": True}, "nesterov=True, and MeritLARS has no nesterov"),
        (MeritLARS, {"dampening": 0.1}, "dampening=0.1, and MeritLARS has no dampening"),
        (Merit, {"weight_deacy": 0.0}, "weight_deacy=0.0, which Merit does not know; did you mean weight_decay"),
        (Merit, {"no_weigth_decay": True}, "did you mean no_weight_decay"),
        (Merit, {"matrix_veiw": "stack"}, "did you mean matrix_view"),
        (MeritSophiaG, {"hessian_interval": 5}, "hessian_interval is one for all groups"),
    ],
)
def test_a_groups_setting_that_would_be_passed_over_is_refused(kind, group, message):
    with pytest.raises(ValueError, match=message):
        kind([{"params": model(), **group}], 0.01)


NOTED_BY_OTHERS = (
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_mult", "lr_scale", "decoupled_lr", "is_decoupled_lr"),
    *("max_momentum", "base_momentum", "wd_mult", "pre_wd_mult", "start_wd", "end_wd", "decoupled_weight_decay"),
    *("max_weight_decay", "end_weight_decay", "initial_weight_decay", "weight_decay_mult", "beta1", "beta2", "steps"),
    *("name", "names", "layer_name", "group_name", "moe", "is_expert_parallel", "default_config", "use_muon"),
)
"""What schedulers, wrappers and training codes write into groups."""


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        (MeritScion, {"weight_decay": 0.0, "sign_update": True}),  # the decay as Hugging Face writes it in any group
        (MeritLion, {"clip": None, "initial_lr": 0.01}),
        (MeritLAMB, {"elementwise": False, "whole_bound": True, "no_weight_decay": True}),
        (MeritScion, {"no_trust_ratio": False}),
        (Merit, {"maximize": False, "foreach": None, "capturable": True, "differentiable": False}),
        (Merit, dict.fromkeys(NOTED_BY_OTHERS, 0.5)),
    ],
)
def test_a_groups_setting_that_asks_for_nothing_may_be_there(kind, group):
    weights = model()
    before = [weight.detach().clone() for weight in weights]
    train(kind([{"params": weights, "note": "anybody's", **group}], 0.01), weights, steps=range(1))
    assert not any(map(torch.equal, weights, before))


@pytest.mark.parametrize(
    ("saver", "loader", "norms"),
    [
        (functools.partial(Merit, norm="l2"), Merit, "norm='l2', and norm is 'max'"),
        (Merit, functools.partial(Merit, norm="l2"), "norm='max', and norm is 'l2'"),
        (MeritLAMB, MeritMaxLAMB, "norm='l2', and norm is 'max'"),
        (MeritMaxLAMB, MeritLAMB, "norm='max', and norm is 'l2'"),
    ],
)
def test_a_state_of_another_norm_is_refused_and_one_that_does_not_say_is_taken(saver, loader, norms):
    weights = model()
    saved = saver(weights, 0.01)
    train(saved, weights, steps=[0])
    state, optimizer = copy.deepcopy(saved.state_dict()), loader(weights, 0.01)
    own = optimizer.param_groups[0]["norm"]
    with pytest.raises(ValueError, match=norms):
        optimizer.load_state_dict(state)
    del state["param_groups"][0]["norm"]  # as of an earlier version
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["norm"] == own
    train(optimizer, weights, steps=[1])
    optimizer.param_groups[0]["norm"] = "another"  # as DeepSpeed loads a universal checkpoint
    with pytest.raises(UnsupportedError, match=f"norm of group 0 was changed from '{own}'"):
        optimizer.step()
    fresh = loader(weights, 0.01)
    fresh.param_groups[0]["norm"] = "another"
    with pytest.raises(ValueError, match="norm is one for all groups"):
        fresh.step()


@pytest.mark.parametrize("marked", ["group", "parameter"])
def test_scion_does_not_shrink_what_has_no_decay(marked):
    weight, other = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
    weight.no_trust_ratio = True  # it has none
    if marked == "parameter":
        weight.no_weight_decay = True
    group = {"no_weight_decay": True} if marked == "group" else {}
    optimizer = MeritScion([{"params": [weight], **group}, {"params": [other]}], 0.1)
    weight.grad, other.grad = torch.zeros(3, 3), torch.zeros(3, 3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3)) and torch.equal(other, torch.full((3, 3), 1.0 - 0.1))


@pytest.mark.parametrize(("key", "value"), [("elementwise", False), ("whole_bound", False), ("no_weight_decay", True)])
def test_what_weights_are_laid_out_by_cannot_change_after_the_first_step(key, value):
    weights, other = model(), model()
    optimizer = Merit(weights, 0.01)
    optimizer.param_groups[0][key] = value  # before the first step it counts
    train(optimizer, weights, steps=range(2))
    train(Merit([{"params": other, key: value}], 0.01), other, steps=range(2))
    assert all(map(torch.equal, weights, other))
    before = [weight.detach().clone() for weight in weights]
    optimizer.param_groups[0][key] = not value
    with pytest.raises(UnsupportedError, match=f"{key} of group 0 was changed from {value} to {not value} after its"):
        train(optimizer, weights, steps=range(1))
    assert all(map(torch.equal, weights, before))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    train(optimizer, weights, steps=range(2, 4))
    again = Merit([{"params": other, key: not value}], 0.01)
    again.load_state_dict(state)
    train(again, other, steps=range(2, 4))
    assert all(map(torch.equal, weights, other))


def test_a_group_that_was_replaced_is_refused_in_any_step():
    weights = model()
    optimizer = Merit(weights, 0.01)
    train(optimizer, weights, steps=range(2))
    group, before = optimizer.param_groups[0], [weight.detach().clone() for weight in weights]
    optimizer.param_groups[0] = {**group, "no_weight_decay": True}
    with pytest.raises(UnsupportedError, match="param_groups were replaced: change the groups in place"):
        train(optimizer, weights, steps=range(1))
    assert all(map(torch.equal, weights, before))
    optimizer.param_groups[0] = group
    train(optimizer, weights, steps=range(1))


def test_a_layout_that_failed_may_be_repaired_and_the_same_said_otherwise():
    weight = torch.nn.Parameter(torch.ones(3, 5, 7))
    optimizer = Merit([{"params": [weight], "matrix_view": "stack"}], 0.01)
    group = optimizer.param_groups[0]
    group["matrix_view"] = "heap"
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="matrix_view 'heap'"):
        optimizer.step()
    group["matrix_view"] = "stack"
    optimizer.step()
    group.update(no_weight_decay=False, no_trust_ratio=None)  # what it was without them
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
