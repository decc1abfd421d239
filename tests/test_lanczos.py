# SPDX-License-Identifier: Apache-2.0
"""Lanczos, Hutchinson and the spectral density against numpy's eigenvalues of random symmetric matrices."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from merit_ds.telemetry.lanczos import lanczos, mean_of, rademacher, spectral_density


def symmetric(eigenvalues: np.ndarray, *, seed: int = 1) -> torch.Tensor:
    """[n, n] float64 with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = (vectors * eigenvalues) @ vectors.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def network_like(n: int = 300) -> np.ndarray:
    """Most eigenvalues near zero, a few far out, some negative: as a network's Hessian has them."""
    bulk = np.random.default_rng(2).standard_normal(n - 5) * 0.3
    return np.concatenate([bulk, [40.0, 17.0, 16.5, 9.0, -4.0]])


def start(n: int, *, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_as_many_steps_as_dimensions_give_every_eigenvalue_and_its_share_of_the_start() -> None:
    matrix, vector = symmetric(np.random.default_rng(4).standard_normal(40)), start(40)
    found = lanczos(matrix.mv, vector, steps=100)
    values, vectors = np.linalg.eigh(matrix.numpy())
    np.testing.assert_allclose(found.nodes, values, atol=1e-11)
    np.testing.assert_allclose(found.weights, (vectors.T @ (vector / vector.norm()).numpy()) ** 2, atol=1e-11)
    assert float(found.residuals.max()) < 1e-11


def test_few_steps_find_the_outer_eigenvalues_within_the_residuals() -> None:
    matrix = symmetric(network_like())
    values = np.linalg.eigvalsh(matrix.numpy())
    found = lanczos(matrix.mv, start(300), steps=15)
    for node, residual in zip(found.nodes, found.residuals, strict=True):
        assert np.abs(values - float(node)).min() <= float(residual) + 1e-10
    np.testing.assert_allclose(found.nodes[-2:], values[-2:], rtol=1e-6)
    np.testing.assert_allclose(found.nodes[0], values[0], rtol=1e-6)
    assert float(found.residuals[7]) > 1e-2  # of an inner node, which is not an eigenvalue yet


def test_the_quadrature_is_exact_up_to_degree_2k_minus_1_and_not_beyond() -> None:
    matrix, vector = symmetric(np.random.default_rng(5).uniform(-1, 1, 60)), start(60)
    found = lanczos(matrix.mv, vector, steps=4)
    unit, power = vector / vector.norm(), torch.eye(60, dtype=torch.float64)
    differences = []
    for degree in range(9):
        differences.append(abs(float(found.weights @ found.nodes**degree) - float(unit @ power @ unit)))
        power = power @ matrix
    assert max(differences[:8]) < 1e-13 < 1e-6 < differences[8]


def test_no_eigenvalue_is_found_twice_in_float32() -> None:
    """Without re-orthogonalisation the top one comes again and again, and takes weight from the others."""
    matrix = symmetric(network_like()).float()
    found = lanczos(matrix.mv, start(300).float(), steps=120)
    near = found.nodes[(found.nodes - 40).abs() < 0.1]
    assert len(near) == 1 and abs(float(near) - 40) < 1e-4


@pytest.mark.parametrize(("eigenvalues", "distinct"), [(np.full(50, 2.5), 1), (np.repeat([3.0, 0.0, -1.0], 20), 3)])
def test_it_ends_where_the_krylov_space_does(eigenvalues: np.ndarray, distinct: int) -> None:
    matrix, calls = symmetric(eigenvalues).float(), []

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return matrix.mv(vector)

    found = lanczos(product, start(len(eigenvalues)).float(), steps=30)
    assert len(calls) == len(found.nodes) == distinct
    np.testing.assert_allclose(found.nodes, np.unique(eigenvalues), atol=1e-5)
    assert float(found.residuals.max()) < 1e-6


def test_a_zero_matrix_has_the_eigenvalue_zero() -> None:
    found = lanczos(torch.zeros_like, torch.ones(5), steps=3)
    assert found.nodes.tolist() == [0] and found.weights.tolist() == [1]


def test_the_trace_is_within_its_standard_error_which_is_the_theorys() -> None:
    matrix = symmetric(network_like())
    generator = torch.Generator().manual_seed(6)
    probes = [rademacher(300, generator=generator).double() for _ in range(400)]
    estimate = mean_of([float(probe @ matrix @ probe) for probe in probes])
    assert estimate.standard_error is not None
    theory = float((2 * (matrix.square().sum() - matrix.diag().square().sum()) / len(probes)).sqrt())
    assert abs(estimate.mean - float(matrix.trace())) < 4 * theory
    assert estimate.standard_error == pytest.approx(theory, rel=0.15)
    assert mean_of([2.0]).standard_error is None


def test_the_density_has_the_eigenvalues_mass_everywhere() -> None:
    values = network_like()
    matrix, generator = symmetric(values), torch.Generator().manual_seed(7)
    found = [lanczos(matrix.mv, rademacher(300, generator=generator).double(), steps=40) for _ in range(40)]
    grid = torch.linspace(-8, 44, 20001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    density = spectral_density(found, grid, sigma=0.1)
    smooth = np.exp(-0.5 * ((grid.numpy()[:, None] - values) / 0.1) ** 2).sum(1) / (300 * 0.1 * np.sqrt(2 * np.pi))
    assert float(density.sum()) * step == pytest.approx(1, abs=1e-9)
    distance = np.abs(np.cumsum(density.numpy()) - np.cumsum(smooth)).max() * step
    assert distance < 0.012
    single = float(density[(grid > 38) & (grid < 42)].sum()) * step
    assert single == pytest.approx(1 / 300, rel=0.5)


def test_the_mathematics_needs_torch_alone() -> None:
    check = (
        "import sys, merit_ds.telemetry.lanczos, merit_ds.telemetry.hessian_product; "
        "sys.exit(any(name.split('.')[0] in ('megatron', 'deepspeed') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
