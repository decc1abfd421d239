# SPDX-License-Identifier: Apache-2.0
"""The picture of Hessians' spectra: curves of runs of quite different curvature can be read and compared."""

from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

from merit_ds.telemetry.hessian_picture import spectra

Curve = tuple[np.ndarray, np.ndarray]


def result(nodes: dict[float, float]) -> dict[str, Any]:
    """What `measure` returns, as far as it is drawn, for eigenvalues with their shares."""
    quadrature = {"nodes": list(nodes), "weights": list(nodes.values()), "residuals": [0.0] * len(nodes)}
    return {
        "label": "a run",
        "data": {"sequences": 1, "tokens": 8},
        "parameters": 1000,
        "loss": 1.5,
        "top_eigenvalues": [{"value": max(nodes), "residual": 0.0}],
        "trace": {"mean": 1.0, "standard_error": None},
        "quadratures": [quadrature],
    }


def curves(*results: dict[str, Any]) -> list[Curve]:
    """Of each result its places on the axis, in units of asinh(eigenvalue / a), and its densities there."""
    figure = spectra(results)
    (axes,) = figure.axes
    scale = axes.xaxis.get_transform()
    lines = [(scale.transform(line.get_xdata()) / scale.linear_width, line.get_ydata()) for line in axes.lines]
    pyplot.close(figure)
    return lines[: len(results)]


def at(curve: Curve, eigenvalue: float, *, linear: float) -> float:
    return float(np.interp(np.arcsinh(eigenvalue / linear), *curve))


SHARP, FLAT = {-6.0: 0.01, 0.0: 0.9, 460.0: 0.09}, {-0.5: 0.01, 0.0: 0.89, 4.0: 0.09, 20.0: 0.01}


def test_a_flat_run_is_resolved_beside_a_sharp_one() -> None:
    """Smoothed by a share of 466 eigenvalues, those at 0 and 4 were one hump."""
    _, flat = curves(result(SHARP), result(FLAT))
    between, beyond = (at(flat, eigenvalue, linear=1.0) for eigenvalue in (2.0, 4.0))
    assert between < beyond / 10


def test_equal_areas_are_equal_shares_of_the_eigenvalues() -> None:
    sharp, flat = curves(result(SHARP), result(FLAT))
    for places, density in (sharp, flat):
        assert np.trapezoid(density, places) == pytest.approx(1.0, rel=1e-3)
    assert at(sharp, 460.0, linear=1.0) == pytest.approx(at(flat, 4.0, linear=1.0), rel=1e-2)


@pytest.mark.parametrize("nodes", [{0.0: 1.0}, {3.0: 1.0}, {-2e-4: 0.5, 1e-3: 0.5}])
def test_any_spectrum_can_be_drawn(nodes: dict[float, float]) -> None:
    ((places, density),) = curves(result(nodes))
    assert np.trapezoid(density, places) == pytest.approx(1.0, rel=1e-3)
