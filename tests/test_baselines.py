# SPDX-License-Identifier: Apache-2.0
"""The baselines against implementations of others, or the papers' formulas in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from baseline_cases import STEPS, gradients, model, train
from lion_pytorch import Lion
from pytorch_optimizer import LARS, SCION, Lamb
from pytorch_optimizer.optimizer.scion import LMONorm

from merit_ds import Merit, MeritLAMB, MeritLARS, MeritLion, MeritMaxLAMB, MeritScion, MeritSophiaG, MeritW
from merit_ds.baselines.lamb import LambRule
from merit_ds.baselines.lion import LionRule
from merit_ds.baselines.scion import ScionRule, orthogonalized
from merit_ds.errors import UnsupportedError
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.ops.merit_rule import MERIT
from merit_ds.ops.rule import L2
from merit_ds.shard import Shard
from merit_ds.summary import summary


def in_float64(weights, formula):
    """The weights after `STEPS` steps of a formula (w, g, m, v, t, matrix) -> (w, m, v) in numpy doubles."""
    found = []
    for index, weight in enumerate(weights):
        w = weight.detach().double().numpy()
        m = v = np.zeros_like(w)
        for step in range(STEPS):
            g = gradients(weights, step)[index].double().numpy()
            w, m, v = formula(w, g, m, v, step + 1, w.ndim == 2)
        found.append(torch.from_numpy(w))
    return found


def assert_close(ours, theirs, *, rtol=2e-5, atol=2e-6):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=rtol, atol=atol)


def lamb_formula(norm, *, lr, decay, corrected=True, clip=math.inf):
    def formula(w, g, m, v, t, matrix):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = (m / (1 - 0.9**t), v / (1 - 0.95**t)) if corrected else (m, v)
        u = m_hat / (np.sqrt(v_hat) + 1e-6) + (decay * w if matrix else 0)
        return w - lr * np.clip(norm(w) / norm(u) * u, -clip, clip), m, v

    return formula


def l2(x):
    return np.sqrt((x * x).sum())


def largest(x):
    return np.abs(x).max()


@pytest.mark.parametrize(("kind", "norm"), [(MeritLAMB, l2), (MeritMaxLAMB, largest)])
@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_is_the_papers_formula(kind, norm, corrected):
    weights = model()
    wanted = in_float64(weights, lamb_formula(norm, lr=0.02, decay=0.1, corrected=corrected))
    assert_close(train(kind(weights, 0.02, bias_correction=corrected), weights), wanted)


def test_lamb_is_that_of_pytorch_optimizer():
    ours, theirs = model(), model()
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}]
    settings = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    other = Lamb(groups, **settings, weight_decouple=False, adam_debias=True)  # its lr is corrected otherwise
    assert_close(train(MeritLAMB(ours, 0.02, bias_correction=False), ours), train(other, theirs))


def test_merit_w_is_lamb_by_max_norms_without_correction_and_clipped():
    weights = model()
    weights[0].data.mul_(20)  # so that the clip binds
    wanted = in_float64(weights, lamb_formula(largest, lr=0.02, decay=0.1, corrected=False, clip=1.0))
    assert_close(train(MeritW(weights, 0.02), weights), wanted)


def test_lars_is_that_of_pytorch_optimizer():
    ours, theirs = model(), model()
    groups = [{"params": ours[:2]}, {"params": ours[2:], "no_trust_ratio": True}]
    other = LARS(theirs, lr=0.5, weight_decay=1e-2, momentum=0.9, trust_coefficient=0.02)
    optimizer = MeritLARS(groups, 0.5, weight_decay=1e-2, trust_coefficient=0.02)
    assert_close(train(optimizer, ours), train(other, theirs))


def test_lion_is_that_of_lion_pytorch():
    ours, theirs = model(), model()
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}]
    other = Lion(groups, lr=0.01, betas=(0.95, 0.98), weight_decay=0.1)
    assert_close(train(MeritLion(ours, 0.01), ours), train(other, theirs))


def test_sophia_is_the_papers_formula():
    weights = model()
    estimates = {step: [grad.flip(0).double().numpy() for grad in gradients(weights, step)] for step in (0, 2, 4)}
    wanted = []
    for index, weight in enumerate(weights):
        w = weight.detach().double().numpy()
        m = h = np.zeros_like(w)
        for step in range(STEPS):
            if step % 2 == 0:
                h = 0.99 * h + 0.01 * 20 * estimates[step][index] ** 2
            m = 0.92 * m + 0.08 * gradients(weights, step)[index].double().numpy()
            u = np.clip(m / np.maximum(0.5 * h, 1e-12), -1, 1)
            w = w - 0.01 * (u + (0.1 * w if w.ndim == 2 else 0))
        wanted.append(torch.from_numpy(w))
    ours = train(MeritSophiaG(weights, 0.01, gamma=0.5), weights)
    assert_close(ours, wanted)


def test_sophia_refuses_to_begin_without_an_estimate_and_gradients_that_do_not_fit():
    weights = model()
    optimizer = MeritSophiaG(weights, 0.01)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(UnsupportedError, match="update_hessian"):
        optimizer.step()
    with pytest.raises(ValueError, match="3 trainable"):
        optimizer.update_hessian([torch.ones(7, 12)], examples=1)
    optimizer.update_hessian([torch.ones_like(weight) for weight in weights], examples=1)
    optimizer.step()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    core = u.t() @ orthogonalized(matrix) @ vt.t()
    assert (core - core.diag().diag()).abs().max() < 1e-4
    assert core.diag().min() > 0.3 and core.diag().max() < 1.3


def test_scion_takes_the_same_step_within_autocast():
    weights = [torch.nn.Parameter(torch.ones(8, 5)) for _ in range(2)]
    for weight, enabled in zip(weights, (False, True), strict=True):
        weight.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            MeritScion([weight], 0.01).step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("constrained", [True, False])
def test_scion_is_that_of_pytorch_optimizer(constrained):
    """Its Newton-Schulz runs in bfloat16, ours in float32."""
    ours, theirs = model(), model()
    ours[1].sign_update = True
    kinds = ((LMONorm.SPECTRAL, 5.0), (LMONorm.SIGN, 30.0), (LMONorm.BIAS, 5.0))
    groups = [
        {"params": [weight], "norm_type": kind, "scale": radius}
        for weight, (kind, radius) in zip(theirs, kinds, strict=True)
    ]
    before = copy.deepcopy(theirs)
    mine = train(MeritScion(ours, 0.01, radius=5.0, sign_radius=30.0, constrained=constrained), ours)
    train(SCION(groups, lr=0.01, momentum=0.1, constraint=constrained), theirs)
    for index, tolerance in ((0, 0.03), (1, 1e-5), (2, 1e-5)):
        moved = (theirs[index] - before[index]).norm()
        assert (mine[index] - theirs[index]).norm() < tolerance * moved


def ablated(weight, grad, *, norm, rows_and_columns, whole, clip):
    """One step of Merit's ablations from the formula, in float64."""
    w, g = weight.detach().double(), grad.double()
    u = 0.1 * g / ((0.05 * g * g).sqrt() + 1e-6) + 0.1 * w
    size = {"max": lambda x, *dims: x.abs().amax(*dims), "l2": lambda x, *dims: x.square().sum(*dims).sqrt()}[norm]
    ratios = []
    if rows_and_columns:
        ratios += [size(w, (1,)).div(size(u, (1,)))[:, None].expand_as(w)]
        ratios += [size(w, (0,)).div(size(u, (0,)))[None].expand_as(w)]
    if whole:
        ratios += [(size(w, (0, 1)) / size(u, (0, 1))).expand_as(w)]
    return w - 0.02 * (torch.stack(ratios).amax(0) * u).clamp(-clip, clip)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize(
    "options", [{}, {"elementwise": False}, {"whole_bound": False}, {"clip": None}, {"clip": 0.05}], ids=str
)
def test_ablations_are_what_they_say(options, norm, fused):
    weight = model()[0]
    weight.data.mul_(5)  # so that the clip binds
    grad = gradients([weight], 0)[0]
    wanted = ablated(
        weight,
        grad,
        norm=norm,
        rows_and_columns=options.get("elementwise", True),
        whole=options.get("whole_bound", True),
        clip=options.get("clip", 1.0) or math.inf,
    )
    plain = ablated(weight, grad, norm=norm, rows_and_columns=True, whole=True, clip=1.0)
    optimizer = Merit([weight], 0.02, norm=norm, fused=fused, **options)
    weight.grad = grad
    optimizer.step()
    assert_close([weight.detach()], [wanted])
    assert torch.allclose(wanted, plain, rtol=1e-4) is (options == {})


def test_an_l2_norm_has_no_fused_kernel():
    weight = model()[0]
    weight.grad = torch.ones_like(weight)
    with pytest.raises(UnsupportedError, match="no fused kernel"):
        Merit([weight], 0.02, norm="l2", fused=True).step()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (MERIT, "1 weights of this rank cut, 64 bytes of maxima a step; kernel"),
        (LambRule(L2), "1 weights of this rank cut, 32 bytes of sums of squares a step; kernel"),
        (LionRule(), "wrapper ZeRO; kernel"),
        (ScionRule(), "wrapper ZeRO; kernel"),
    ],
)
def test_the_line_at_startup_says_what_is_exchanged_only_of_norms(rule, said):
    """Lion sends nothing, and Scion whole momenta: neither has maxima, which a weight in two slices would share."""
    matrix = Matrix(0, 6, 5, elementwise=rule.elementwise, scaled=rule.norm is not None)
    layout = ShardLayout.build([matrix], bounds=[0, 7, 30], rank=0)
    shard = Shard(torch.nn.Parameter(torch.zeros(7)), layout, (matrix,), wrapper="ZeRO", group="all")
    assert said in summary([({"lr": 0.1}, [shard])], name="Any", rule=rule, fused=False)
