# SPDX-License-Identifier: Apache-2.0
"""Tensor subclasses that wrap others and have no memory of their own: their address is 0."""

import pytest
import torch
from optimizer_case import SETTINGS, gradient, parameter
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from merit_ds import Merit, UnsupportedError


def without_memory(tensor):
    return TwoTensor(tensor.clone(), tensor.clone())


def matrix(*, wrapped=False):
    weight = Parameter(without_memory(parameter(6, 5).detach())) if wrapped else parameter(6, 5)
    weight.grad = gradient((6, 5), step=0)
    return weight


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("which", ["weight", "gradient", "both"])
def test_the_fused_kernel_refuses_what_has_no_memory(fused, which):
    """It would crash, or take the gradient for missing and never train the weight."""
    weight = matrix(wrapped=which != "gradient")
    if which != "weight":
        weight.grad = without_memory(weight.grad)
    with pytest.raises(UnsupportedError, match=r"a TwoTensor of shape \(6, 5\) has none: give fused=False"):
        Merit([weight], fused=fused, **SETTINGS).step()


@pytest.mark.parametrize("wrapped_gradient", [True, False])
def test_plain_torch_operations_step_it_exactly(wrapped_gradient):
    weight, plain = matrix(wrapped=True), matrix()
    if wrapped_gradient:
        weight.grad = without_memory(weight.grad)
    Merit([weight], fused=False, **SETTINGS).step()
    Merit([plain], fused=True, **SETTINGS).step()
    assert torch.equal(weight.a, plain) and torch.equal(weight.b, plain)


def test_a_gradient_may_lose_its_memory_after_the_first_step():
    weight = matrix()
    optimizer = Merit([weight], fused=True, **SETTINGS)
    optimizer.step()
    weight.grad = without_memory(weight.grad)
    before = weight.detach().clone()
    with pytest.raises(UnsupportedError, match="a TwoTensor of shape"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_what_is_empty_or_has_no_gradient_needs_no_memory():
    empty, idle, weight, other = Parameter(torch.zeros(0, 5)), matrix(wrapped=True), matrix(), matrix()
    empty.grad, idle.grad = torch.zeros(0, 5), None
    for parameters in ([empty, idle, weight], [other]):
        Merit(parameters, fused=True, **SETTINGS).step()
    assert torch.equal(weight, other) and torch.equal(idle.a, matrix())
