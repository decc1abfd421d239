# SPDX-License-Identifier: Apache-2.0
"""Spectra of symmetric matrices that are known only by their products with vectors; needs torch alone.

Lanczos with full re-orthogonalisation gives extreme eigenvalues, and with random start vectors, as a Gauss quadrature,
the spectral density (Golub & Welsch 1969; Ghorbani et al., arXiv 1901.10159; PyHessian, arXiv 1912.07145).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Product = Callable[[torch.Tensor], torch.Tensor]
"""Maps v [n] to Hv [n], in v's dtype and on its device, and keeps v as it is."""


@dataclass(frozen=True)
class Quadrature:
    """What Lanczos finds from one start vector v of unit length: v's spectral measure, in at most `steps` nodes.

    Attributes:
        nodes: [k] float64, ascending: the Ritz values, which approximate eigenvalues, the outermost ones best.
        weights: [k] float64, not negative, of sum 1: the squares of v's components along the Ritz vectors. The sum of
            weight f(node) is v' f(H) v, exactly for polynomials of a degree below 2k.
        residuals: [k] float64: within this distance of its node lies an eigenvalue of H.
    """

    nodes: torch.Tensor
    weights: torch.Tensor
    residuals: torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """The mean of independent samples, and its standard error: None for a single sample."""

    mean: float
    standard_error: float | None


def lanczos(product: Product, start: torch.Tensor, *, steps: int) -> Quadrature:
    """Lanczos from `start`; ends early where the Krylov space does. Holds `steps` vectors.

    Args:
        product: the symmetric matrix H; called once a step.
        start: [n], not zero; need not have unit length.
        steps: at least 1; at most n are done.
    """
    dtype, steps = start.dtype, min(steps, start.numel())
    basis = torch.empty(steps, start.numel(), dtype=dtype, device=start.device)
    vector = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        basis[step] = vector
        image = product(vector)
        diagonal.append(float(image @ vector))
        scale = float(image.norm())
        done = basis[: step + 1]
        # Twice: what rounding leaves of the older vectors would grow into copies of eigenvalues already found.
        for _ in range(2):
            image = image - done.T @ (done @ image)
        length = float(image.norm())
        if length <= 10 * math.sqrt(start.numel()) * torch.finfo(dtype).eps * scale:
            length = 0.0  # rounding is all that is left: the space is invariant, and its Ritz values are eigenvalues
        beside.append(length)
        if length == 0.0:
            break
        vector = image / length
    return _quadrature(diagonal, beside, eps=torch.finfo(dtype).eps)


def _quadrature(diagonal: list[float], beside: list[float], *, eps: float) -> Quadrature:
    """From the tridiagonal matrix: its diagonal, and the entries beside it with the one that leads out of it last."""
    between = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    tridiagonal += torch.diag(between, 1) + torch.diag(between, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    # Products of this precision cannot tell eigenvalues that are nearer than this.
    rounding = eps * float(nodes.abs().max())
    residuals = (beside[-1] * vectors[-1].abs()).clamp(min=rounding)
    return Quadrature(nodes=nodes, weights=vectors[0] ** 2, residuals=residuals)


def rademacher(size: int, *, generator: torch.Generator) -> torch.Tensor:
    """[size] float32 on the CPU, each entry 1 or -1 with probability 1/2."""
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def mean_of(samples: list[float]) -> Estimate:
    """Of at least one sample. For Hutchinson's estimator of the trace the samples are z'Hz, with z of signs."""
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(samples))) if len(samples) > 1 else None
    return Estimate(float(values.mean()), error)


def spectral_density(quadratures: list[Quadrature], grid: torch.Tensor, *, sigma: float) -> torch.Tensor:
    """Density of the eigenvalues, each smoothed to a normal distribution: the mean over the start vectors.

    Args:
        quadratures: from random start vectors with independent entries.
        grid: [m] float64, where to evaluate.
        sigma: the normal distribution's standard deviation.

    Returns:
        [m] float64; the integral over all numbers is 1.
    """
    density = torch.zeros_like(grid)
    for quadrature in quadratures:
        distance = (grid[:, None] - quadrature.nodes) / sigma
        density += torch.exp(-0.5 * distance**2) @ quadrature.weights
    return density / (len(quadratures) * sigma * math.sqrt(2 * math.pi))
