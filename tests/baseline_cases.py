# SPDX-License-Identifier: Apache-2.0
"""What tests of the baselines share: a few weights, gradients for each step, and the steps."""

import torch

from merit_ds import MeritLAMB, MeritLARS, MeritLion, MeritMaxLAMB, MeritScion, MeritSophiaG, MeritW

STEPS = 5
BASELINES = [MeritW, MeritLAMB, MeritMaxLAMB, MeritLARS, MeritLion, MeritSophiaG, MeritScion]


def model(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(0.3 * torch.randn(shape, generator=draw)) for shape in ((7, 12), (12, 5), (9,))]


def gradients(weights, step):
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(weight.shape, generator=draw) for weight in weights]


def train(optimizer, weights, *, steps=range(STEPS)):
    for step in steps:
        grads = gradients(weights, step)
        if isinstance(optimizer, MeritSophiaG) and step % 2 == 0:
            optimizer.update_hessian([grad.flip(0) for grad in grads], examples=20)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]
