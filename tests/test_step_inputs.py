# SPDX-License-Identifier: Apache-2.0
"""What a step is handed from one call to the next: tensors that move, change or are missing, flags, learning rates."""

import weakref

import pytest
import torch
from oracle import GROUP
from torch.nn import Parameter

from merit_ds import Merit, UnsupportedError
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.operands import Gatherer
from merit_ds.shard import Shard

SETTINGS = {name: GROUP[name] for name in ("lr", "betas", "eps", "weight_decay")}


def matrix(rows=6, cols=5, *, seed=0):
    weight = Parameter(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)))
    weight.grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1))
    return weight


@pytest.mark.parametrize("fused", [True, False])
def test_found_inf_leaves_everything_as_it_was(fused):
    weight = matrix()
    before = weight.detach().clone()
    optimizer = Merit([weight], fused=fused, **SETTINGS)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before) and not optimizer.state[weight]["exp_avg"].any()
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("fused", [True, False])
def test_found_inf_may_be_a_number(fused):
    weight = matrix()
    before = weight.detach().clone()
    optimizer = Merit([weight], fused=fused, **SETTINGS)
    optimizer.found_inf = 1.0
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.found_inf = 0
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_between_forward_and_backward_does_not_pass_unseen(fused):
    weight = matrix()
    loss = (weight * weight).sum()
    Merit([weight], fused=fused, **SETTINGS).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_that_was_left_alone_counts_as_unchanged(fused):
    weight, frozen = matrix(), matrix(seed=3)
    loss = (frozen * frozen).sum()
    frozen.grad = None
    Merit([weight, frozen], fused=fused, **SETTINGS).step()
    loss.backward()  # autograd would refuse a tensor that had been written to
    assert torch.equal(frozen.grad, 2 * frozen)


@pytest.mark.parametrize("fused", [True, False])
def test_tensors_may_move_between_steps(fused):
    """New storage for weights, gradients and moments, gradients that are missing for a step, strided ones."""
    moving, still = ([matrix(seed=seed) for seed in (0, 2)] for _ in range(2))
    first, second = (Merit(weights, fused=fused, **SETTINGS) for weights in (moving, still))
    for step in range(5):
        for weight, other in zip(moving, still, strict=True):
            other.grad = matrix(seed=10 * step).grad
            weight.grad = other.grad.t().contiguous().t()
        if step == 1:
            moving[1].grad = still[1].grad = None
        if step == 2:
            moving[0].data = moving[0].data.clone()
        if step == 3:
            state = first.state[moving[0]]
            state["exp_avg"] = state["exp_avg"].clone()
            state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()
        first.step()
        second.step()
    assert all(torch.equal(weight, other) for weight, other in zip(moving, still, strict=True))
    assert [first.state[weight]["step"] for weight in moving] == [5, 4]
    moving[0].data = moving[0].data.double()
    if fused:
        with pytest.raises(ValueError, match="float64"):
            first.step()


@pytest.mark.parametrize("fused", [True, False])
def test_what_no_longer_fits_is_refused_and_nothing_is_written(fused):
    """Other strides, another size, a sparse gradient; after each the optimizer goes on once it is put right."""
    weight = matrix(6, 6)
    optimizer = Merit([weight], fused=fused, **SETTINGS)
    optimizer.step()
    right, moment = weight.data, optimizer.state[weight]["exp_avg"]
    grad, before = weight.grad, weight.detach().clone()

    def refused(change, match):
        change()
        with pytest.raises((UnsupportedError, ValueError), match=match):
            optimizer.step()
        weight.grad = None
        weight.data, weight.grad, optimizer.state[weight]["exp_avg"] = right, grad, moment
        assert torch.equal(weight, before)

    def transpose():
        weight.data = weight.data.t()

    def shrink():
        weight.data, weight.grad = right.view(-1)[:12].view(2, 6), None
        weight.grad = torch.ones(2, 6)

    def turn():
        weight.data, weight.grad = right.view(4, 9), None
        weight.grad = torch.ones(4, 9)

    def stride_a_moment():
        optimizer.state[weight]["exp_avg"] = torch.zeros(6, 12)[:, ::2]

    def sparse():
        weight.grad = torch.eye(6).to_sparse()

    refused(transpose, "contiguous")
    refused(shrink, "changes its shape")
    refused(turn, "changes its shape")
    refused(stride_a_moment, "contiguous")
    refused(sparse, "sparse")
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("missing", [False, True])
def test_a_gradient_that_stays_the_same_object_may_get_other_data(fused, missing):
    """Transposed, expanded and of a wrong size, set by `.data`: a kernel would read beside it, or beyond its end."""
    weight, other = matrix(6, 6), matrix(6, 6)
    idle = matrix(seed=3)
    idle.grad = None if missing else idle.grad
    first, second = Merit([weight, idle], fused=fused, **SETTINGS), Merit([other], fused=fused, **SETTINGS)
    first.step()
    second.step()
    for data in (matrix(6, 6, seed=5).grad.t(), torch.ones(1).expand(6, 6), matrix(6, 12, seed=7).grad[:, ::2]):
        weight.grad.data, other.grad = data, data.contiguous()
        first.step()
        second.step()
        assert torch.equal(weight, other)
    weight.grad.data = weight.grad.data.contiguous()
    first.step()
    weight.grad.data = weight.grad.data.view(-1)[:5]
    with pytest.raises(UnsupportedError, match=r"a gradient has shape \(5,\) and its parameter had \(6, 6\)"):
        first.step()


@pytest.mark.parametrize("fused", [True, False])
def test_the_default_device_is_not_the_steps(fused):
    """The tables and scalars that the host makes, under a default device on which nothing can be read."""
    weight, other = matrix(), matrix()
    with torch.device("meta"):
        Merit([weight], fused=fused, **SETTINGS).step()
    Merit([other], fused=fused, **SETTINGS).step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("fused", [True, False])
def test_a_lazily_negated_gradient_is_what_it_says(fused):
    plain, lazy = matrix(), matrix()
    plain.grad.neg_()
    lazy.grad = torch._neg_view(lazy.grad)
    for weight in (plain, lazy):
        Merit([weight], fused=fused, **SETTINGS).step()
    assert torch.equal(plain, lazy)


def test_a_learning_rate_on_a_device_leaves_no_trace_when_it_is_gone(monkeypatch):
    """The host does not know its value; a float of any value must be seen as a change."""
    weight, other = matrix(), matrix()
    optimizer, plain = Merit([weight], **SETTINGS), Merit([other], **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("merit_ds.step.lr_on_device", lambda group: torch.tensor(0.1))
        patch.setattr("merit_ds.ops.table.lr_on_device", lambda group: torch.tensor(0.1))
        optimizer.step()
    plain.step()
    optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.0
    optimizer.step()
    plain.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("fused", [True, False])
def test_no_gradient_is_held_after_the_step(fused):
    weight = matrix()
    optimizer = Merit([weight], fused=fused, **SETTINGS)
    optimizer.step()
    gradient = weakref.ref(weight.grad)
    optimizer.zero_grad()
    assert gradient() is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)])
def test_gradients_that_are_gone_since_the_last_step_leave_their_weights_alone(fused, gone):
    """`zero_grad` without a backward pass: a reference to a gradient that is gone looks like one that never was."""
    weights, others = ([matrix(seed=seed) for seed in (0, 2)] for _ in range(2))
    optimizer = Merit(weights, fused=fused, **SETTINGS)
    alone = [Merit([other], fused=fused, **SETTINGS) for other in others]
    for missing in ((), gone, gone):
        for number in missing:
            weights[number].grad = None
        optimizer.step()
        for number in {0, 1}.difference(missing):
            alone[number].step()
        assert all(map(torch.equal, weights, others))
    assert [optimizer.state[weight]["step"] for weight in weights] == [3 - 2 * (number in gone) for number in (0, 1)]


def test_a_partitions_gradient_that_is_gone_since_the_last_step_is_refused():
    layout = ShardLayout.build([Matrix(0, 6, 5)], bounds=[0, 30], rank=0)
    weight = matrix()
    gather = Gatherer([Shard(weight, layout, (), wrapper="none", group="all")], moments=())
    gather([weight.grad], [None])
    weight.grad = None
    with pytest.raises(UnsupportedError, match="a partition of zero_optimization has no gradient"):
        gather([weight.grad], [None])


def test_parameters_without_a_gradient_get_no_state():
    weight, frozen = matrix(), matrix(seed=3)
    frozen.grad = None
    optimizer = Merit([weight, frozen], **SETTINGS)
    optimizer.step()
    assert frozen not in optimizer.state
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert optimizer.state[frozen]["step"] == 1 and optimizer.state[weight]["step"] == 2


def test_a_refusal_before_anything_was_touched_does_not_stay(monkeypatch):
    """A graph's capture with new settings is refused and says to take a step first, which must then be possible."""
    weight, other = matrix(), matrix()
    optimizer, plain = Merit([weight], fused=False, **SETTINGS), Merit([other], fused=False, **SETTINGS)
    optimizer.step()
    plain.step()
    for each in (optimizer, plain):
        each.param_groups[0]["lr"] = 0.5
    ((_, stepper),) = next(iter(optimizer._works.values()))._steppers
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "device", torch.device("cuda"))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(UnsupportedError, match="take a step before the capture"):
            optimizer.step()
    optimizer.step()
    plain.step()
    assert torch.equal(weight, other) and optimizer.state[weight]["step"] == 2
