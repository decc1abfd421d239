# SPDX-License-Identifier: Apache-2.0
"""Weights, gradients and their trajectory by the reference, for the tests of Merit in plain PyTorch."""

import torch

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
