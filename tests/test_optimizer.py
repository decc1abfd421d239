# SPDX-License-Identifier: Apache-2.0
"""Merit alone, in plain PyTorch."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_ds import Merit, UnsupportedError
from merit_ds.ops import eager
from merit_ds.reference import merit_step

SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameter(*shape, seed=0, scale=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype))


def gradient(shape, *, step, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7919 * step + seed))


def train(optimizer, parameters, *, steps=range(4)):
    for step in steps:
        for index, weight in enumerate(parameters):
            weight.grad = gradient(weight.shape, step=step, seed=index).to(weight.dtype)
        optimizer.step()


def expected(weight, *, steps=range(4), seed=0, **settings):
    """The reference's trajectory of one float32 weight."""
    weight = weight.detach().clone()
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in steps:
        merit_step(weight, gradient(weight.shape, step=step, seed=seed), *moments, **{**SETTINGS, **settings})
    return weight


@pytest.mark.parametrize("shape", [(5, 7), (1, 40), (40, 1), (1, 1), (300, 3), (3, 300)])
@pytest.mark.parametrize("tile", [1, 4, 1 << 16])
def test_tiles_do_not_change_a_bit(shape, tile, monkeypatch):
    monkeypatch.setattr(eager, "_TILE_CPU", tile)
    weight = parameter(*shape)
    before = expected(weight)
    train(Merit([weight], fused=False, **SETTINGS), [weight])
    assert torch.equal(weight, before)


def test_vectors_are_undecayed_by_default_and_obey_their_group_on_request():
    matrix, vector, scalar = parameter(4, 5), parameter(6), parameter()
    for obey, decay in ((False, 0.0), (True, 0.1)):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, vector, scalar)]
        train(Merit(copies, decay_vectors=obey, **SETTINGS), copies)
        assert torch.equal(copies[0], expected(matrix))
        assert torch.equal(copies[1], expected(vector, seed=1, weight_decay=decay))
        assert torch.equal(copies[2], expected(scalar, seed=2, weight_decay=decay))


@pytest.mark.parametrize("settings_", [{"clip": None}, {"clip": 0.01}, {"eps_inside_sqrt": True}])
def test_options(settings_):
    weight = parameter(6, 5, scale=3.0)
    plain, changed = expected(weight), expected(weight, **settings_)
    train(Merit([weight], **SETTINGS, **settings_), [weight])
    assert torch.equal(weight, changed)
    assert not torch.equal(weight, plain)


def test_groups_override_settings():
    first, second = parameter(4, 5), parameter(5, 4, seed=1)
    wanted = expected(first, lr=0.5), expected(second, seed=1, weight_decay=0.0, clip=0.1)
    optimizer = Merit([{"params": [first], "lr": 0.5}], **SETTINGS)
    optimizer.add_param_group({"params": [second], "weight_decay": 0.0, "clip": 0.1})
    train(optimizer, [first, second])
    assert torch.equal(first, wanted[0]) and torch.equal(second, wanted[1])


def test_stacks_and_convolutions_are_the_matrices_they_say():
    stack, convolution = parameter(3, 4, 5), parameter(4, 3, 2, 2, seed=1)
    stack.matrix_view = "stack"
    starts = stack.detach().clone(), convolution.detach().clone()
    optimizer = Merit([{"params": [stack]}, {"params": [convolution], "matrix_view": "flatten"}], **SETTINGS)
    train(optimizer, [stack, convolution], steps=[0])
    for index in range(3):
        weight, grad = starts[0][index], gradient((3, 4, 5), step=0)[index]
        merit_step(weight, grad, torch.zeros(4, 5), torch.zeros(4, 5), **SETTINGS)
        assert torch.equal(stack[index], weight)
    weight = starts[1].flatten(1)
    merit_step(weight, gradient((4, 3, 2, 2), step=0, seed=1).flatten(1), *torch.zeros(2, 4, 12), **SETTINGS)
    assert torch.equal(convolution.flatten(1), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_once_a_step(dtype):
    weight = parameter(8, 9, dtype=dtype)
    master = weight.detach().float()
    grad = gradient((8, 9), step=0).to(dtype)
    optimizer = Merit([weight], **SETTINGS)
    weight.grad = grad
    optimizer.step()
    merit_step(master, grad.float(), torch.zeros(8, 9), torch.zeros(8, 9), **SETTINGS)
    assert torch.equal(weight, master.to(dtype))
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


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


def test_closure_schedule_and_missing_gradients():
    weight, idle = parameter(4, 5), parameter(3, 3, seed=1)
    idle_before = idle.detach().clone()
    optimizer = Merit([weight, idle], **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):

        def closure():
            optimizer.zero_grad()
            loss = (weight**2).sum()
            loss.backward()
            return loss

        before = (weight.detach() ** 2).sum()
        assert optimizer.step(closure) == before
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 4)
    assert torch.equal(idle, idle_before) and idle not in optimizer.state


def test_nan_reaches_the_caller_and_zero_maxima_do_not():
    weight = parameter(6, 5)
    weight.grad = torch.zeros(6, 5)
    weight.grad[2, 3] = float("nan")
    Merit([weight], **SETTINGS).step()
    assert weight.isnan().all(), "the whole-weight maximum carries a NaN to every element"
    vector = torch.nn.Parameter(torch.zeros(7))
    vector.grad = torch.ones(7)
    Merit([vector], **SETTINGS).step()
    assert vector.isfinite().all() and (vector != 0).all()


def test_empty_parameters_are_skipped():
    empty, weight = torch.nn.Parameter(torch.zeros(0, 3)), parameter(4, 5)
    wanted = expected(weight, seed=1)
    train(Merit([empty, weight], **SETTINGS), [empty, weight])
    assert torch.equal(weight, wanted)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e3]),
    st.sampled_from([1e-30, 1e-8, 1.0, 1e10]),
)
def test_scaled_update_never_exceeds_the_largest_weight(rows, cols, seed, weight_scale, grad_scale):
    """|s * u| <= max|w|, up to rounding, wherever s is not the fallback 1 (DESIGN: a property of the max norms)."""
    generator = np.random.default_rng(seed)
    start = torch.from_numpy(generator.standard_normal((rows, cols)).astype(np.float32)) * weight_scale
    start[start == 0] = weight_scale
    weight = torch.nn.Parameter(start.clone())
    weight.grad = torch.from_numpy(generator.standard_normal((rows, cols)).astype(np.float32)) * grad_scale
    Merit([weight], lr=1.0, clip=None, weight_decay=0.1).step()
    moved = (start - weight.detach()).abs().max()
    assert moved <= start.abs().max() * (1 + 1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "0.1"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", -1e-9),
        ("weight_decay", float("inf")),
        ("clip", 0.0),
        ("clip", True),
        ("eps", torch.tensor(1e-6)),
        ("decay_vectors", 1),
        ("eps_inside_sqrt", None),
    ],
)
def test_bad_values_name_argument_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"Merit: {name}=.*must be"):
        Merit([parameter(2, 2)], **{**SETTINGS, name: value})
    optimizer = Merit([parameter(2, 2)], **SETTINGS)
    with pytest.raises(ValueError, match=rf"Merit: {name}=.*must be"):
        optimizer.add_param_group({"params": [parameter(3, 3)], name: value})
    assert len(optimizer.param_groups) == 1


def test_unsupported_parameters_are_refused():
    with pytest.raises(ValueError, match="float64"):
        Merit([parameter(2, 2, dtype=torch.float64)], lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*matrix_view"):
        Merit([parameter(2, 3, 4)], lr=0.1)
    with pytest.raises(ValueError, match="matrix_view='rows'"):
        Merit([{"params": [parameter(2, 3, 4)], "matrix_view": "rows"}], lr=0.1)
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        Merit(embedding.parameters(), lr=0.1).step()
    transposed = torch.nn.Parameter(torch.randn(3, 4).t())
    transposed.grad = torch.ones(4, 3)
    with pytest.raises(UnsupportedError, match="contiguous"):
        Merit([transposed], lr=0.1).step()


def test_a_group_that_is_refused_by_whatever_error_is_not_kept():
    optimizer = Merit([parameter(4, 5)], **SETTINGS)
    with pytest.raises(RuntimeError, match="uninitialized"):
        optimizer.add_param_group({"params": [torch.nn.parameter.UninitializedParameter()]})
    assert len(optimizer.param_groups) == 1


def test_a_list_of_parameters_that_was_changed_and_other_strides_say_what_to_do():
    weight, late = parameter(4, 5), parameter(4, 5, seed=1)
    optimizer = Merit([weight], **SETTINGS)
    optimizer.param_groups[0]["params"].append(late)
    with pytest.raises(UnsupportedError, match=r"list of parameters was changed .* from 1 to 2: .* add_param_group"):
        train(optimizer, [weight, late])
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = Merit([{"params": [convolution.weight], "matrix_view": "flatten"}], **SETTINGS)
    with pytest.raises(UnsupportedError, match=r"shape \(4, 3, 3, 3\) is not: set p.data = p.data.contiguous\(\)"):
        train(optimizer, [convolution.weight], steps=[0])
    convolution.to(memory_format=torch.contiguous_format)
    train(optimizer, [convolution.weight], steps=[0])


def test_registration_never_overwrites(monkeypatch):
    from merit_ds.registration import register

    assert torch.optim.Merit is torch.optim.MERIT is torch.optim.merit is Merit
    monkeypatch.setattr(torch.optim, "MERIT", torch.optim.SGD)
    with pytest.raises(RuntimeError, match=r"torch\.optim\.MERIT is already"):
        register(Merit)
    assert torch.optim.MERIT is torch.optim.SGD
