# SPDX-License-Identifier: Apache-2.0
"""Merit alone, in plain PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_case import SETTINGS, expected, gradient, parameter, train

from merit_ds import Merit, UnsupportedError
from merit_ds.ops import eager
from merit_ds.reference import merit_step


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


@pytest.mark.parametrize("fused", [0, 1, 0.0, "false"])
def test_fused_is_one_of_three_and_no_number(fused):
    """0 equals False, and yet it chose the fused kernel."""
    with pytest.raises(ValueError, match=f"Merit: fused={fused!r}, but it must be True, False or None"):
        Merit([parameter(2, 2)], fused=fused, **SETTINGS)


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


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_twice_in_a_group_is_refused_by_name():
    """Two threads of a kernel would step it at once; torch only warns."""
    tied, other = parameter(3, 3), parameter(3, 4)
    with pytest.raises(ValueError, match=r"parameter number 2 of a group, of shape \(3, 3\), is in it already"):
        Merit([tied, other, tied], **SETTINGS)
    optimizer = Merit([("other.weight", other)], **SETTINGS)
    tied.requires_grad_(False)  # it may be trained later
    with pytest.raises(ValueError, match=r"Merit: parameter head.weight of a group.*give each once, also a tied"):
        optimizer.add_param_group({"params": [("embedding.weight", tied), ("head.weight", tied)]})
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
