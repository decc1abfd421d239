# SPDX-License-Identifier: Apache-2.0
"""What tests of the baselines share: weights, gradients for each step, the steps, and settings under sharding."""

import torch
from zero_cases import Shapes

import merit_ds
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


EXACT = {
    "MeritW": {},
    "Merit without the whole-weight bound": {"whole_bound": False},
    "MeritMaxLAMB": {},
    "MeritLion": {},
    "MeritSophiaG": {"gamma": 0.5},
    "MeritScion": {"radius": 5.0, "sign_radius": 5.0},
}
ROUNDED = {"MeritLAMB": {}, "MeritLARS": {"trust_coefficient": 0.1}, "Merit by l2 norms": {"norm": "l2"}}


class NonEmptyShapes(Shapes):
    """Under ZeRO-3, DeepSpeed's own gathering of a parameter without elements fails."""

    def __init__(self):
        super().__init__()
        del self.empty
        self.wide.sign_update = True


def kind_of(name):
    return getattr(merit_ds, name.split()[0])


def options(name):
    return {"lr": 0.03, **(EXACT | ROUNDED)[name]}
