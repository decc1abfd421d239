# SPDX-License-Identifier: Apache-2.0
"""MERIT in numpy, written apart from the package: what its results are held against, bit for bit."""

import numpy as np

GROUP = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "clip": 1.0,
    "decay_vectors": False,
    "eps_inside_sqrt": False,
}
"""A parameter group's settings, as Merit has them."""


def numpy_step(w, g, m, v, *, lr, beta1, beta2, eps, weight_decay, clip=1.0, eps_inside_sqrt=False, scaled=True):
    """One step in float32, one rounding for each operation; returns (w, m, v). `scaled=False`: no trust ratio."""
    f = np.float32
    with np.errstate(all="ignore"):
        m = m * f(beta1) + g * f(1 - beta1)
        v = v * f(beta2) + (g * g) * f(1 - beta2)
        root = np.sqrt(v + f(eps)) if eps_inside_sqrt else np.sqrt(v) + f(eps)
        u = m / root + w * f(weight_decay)
        if not scaled:
            return w - np.clip(u, f(-clip), f(clip)) * f(lr), m, v
        a, b = np.abs(w), np.abs(u)
        whole = a.max() / b.max()
        if w.ndim == 1:
            s = np.where((a.max() == 0) | (b.max() == 0), f(1), whole)
        else:
            aw, au, cw, cu = a.max(1, keepdims=True), b.max(1, keepdims=True), a.max(0), b.max(0)
            s = np.maximum(np.maximum(aw / au, cw / cu), whole)
            s = np.where((aw == 0) | (au == 0) | (cw == 0) | (cu == 0), f(1), s)
        return w - np.clip(u * s, f(-clip), f(clip)) * f(lr), m, v
