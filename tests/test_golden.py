# SPDX-License-Identifier: Apache-2.0
"""The published optimizer's trajectories, and a float32 oracle in numpy.

The golden file was made with the authors' optimizer in torch, which fuses some multiply-adds; this project never does.
One fused operation differs from two rounded ones by at most half a unit in the last place, so a step's weights may
differ by a few such units of the largest weight, and over 8 steps by a few more. The numpy oracle, which rounds after
every operation, stays within 3.3e-7 of max|w| (2.8 units of 1.2e-7); the bound is 5e-7.
The oracle, the reference and the optimizer round alike, so they are held to be equal bit for bit.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import numpy_step

from merit_ds import Merit
from merit_ds.reference import merit_step

GOLDEN = np.load(Path(__file__).parent / "data" / "official_merit_trajectories.npz")
CASES = sorted({int(key.split("_")[0]) for key in GOLDEN.files})
BOUND = 5e-7


def run(case: int, stepper):
    """Weights after each step, and the final moments, of one implementation on one golden case."""
    w0, grads, hp = (GOLDEN[f"{case}_{key}"] for key in ("w0", "grads", "hp"))
    settings = dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay"), map(float, hp), strict=True))
    return stepper(w0.copy(), grads, settings)


def by_numpy(w, grads, settings):
    m = v = np.zeros_like(w)
    weights = []
    for g in grads:
        w, m, v = numpy_step(w, g, m, v, **settings)
        weights.append(w)
    return np.stack(weights), m, v


def by_reference(w, grads, settings):
    weight, m, v = torch.from_numpy(w), torch.zeros(w.shape), torch.zeros(w.shape)
    rest = {"lr": settings["lr"], "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
    weights = []
    for g in grads:
        merit_step(weight, torch.from_numpy(g), m, v, betas=(settings["beta1"], settings["beta2"]), **rest)
        weights.append(weight.numpy().copy())
    return np.stack(weights), m.numpy(), v.numpy()


def by_merit(w, grads, settings):
    weight = torch.nn.Parameter(torch.from_numpy(w))
    rest = {"lr": settings["lr"], "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
    optimizer = Merit([weight], betas=(settings["beta1"], settings["beta2"]), decay_vectors=True, **rest)
    weights = []
    for g in grads:
        weight.grad = torch.from_numpy(g)
        optimizer.step()
        weights.append(weight.detach().numpy().copy())
    state = optimizer.state[weight]
    return np.stack(weights), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stepper", [by_numpy, by_reference, by_merit])
def test_golden_trajectory(case, stepper):
    weights, m, v = run(case, stepper)
    for ours, golden in ((weights, GOLDEN[f"{case}_w"]), (m, GOLDEN[f"{case}_m"]), (v, GOLDEN[f"{case}_v"])):
        assert np.abs(ours - golden).max() <= BOUND * np.abs(golden).max()
    moved = np.abs(weights[-1] - GOLDEN[f"{case}_w0"]).max() > 100 * BOUND
    assert moved == GOLDEN[f"{case}_grads"].any()  # one case has zero gradients and no decay, and must stay


@pytest.mark.parametrize("case", CASES)
def test_oracle_reference_and_merit_agree_bitwise(case):
    oracle = run(case, by_numpy)
    for stepper in (by_reference, by_merit):
        for ours, expected in zip(run(case, stepper), oracle, strict=True):
            np.testing.assert_array_equal(ours.view(np.int32), expected.view(np.int32))
