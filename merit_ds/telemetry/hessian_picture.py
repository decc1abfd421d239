# SPDX-License-Identifier: Apache-2.0
"""Spectral densities of Hessians as a picture: one, or several over one another."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merit_ds.telemetry.lanczos import Quadrature, spectral_density

_POINTS = 2000
_WIDTH = 0.005
"""The smoothing's standard deviation, as a share of the range of all nodes drawn."""
_MARGIN = 8
"""Smoothing widths left and right of the outermost nodes."""


def draw_spectra(results: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the `spectra`.

    Args:
        results: as `measure` returns them; at least one.
        path: replaced once the picture is complete.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = spectra(results)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    plt.close(figure)


def spectra(results: Sequence[dict[str, Any]], *, colours: Sequence[str] | None = None) -> Any:
    """A figure: the logarithm of each density against the eigenvalue, with top eigenvalue and trace.

    All densities are smoothed alike, as their widths and heights could not be compared otherwise.

    Args:
        results: as `measure` returns them; at least one.
        colours: of each; None: matplotlib's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = colours or [f"C{index}" for index in range(len(results))]
    densities = [_quadratures(result) for result in results]
    nodes = torch.cat([quadrature.nodes for spectrum in densities for quadrature in spectrum])
    low, high = float(nodes.min()), float(nodes.max())
    # All nodes alike happens only for a multiple of the identity; any width shows it.
    sigma = _WIDTH * ((high - low) or abs(high) or 1.0)
    grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, _POINTS, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150)
    for colour, result, spectrum in zip(colours, results, densities, strict=True):
        density = spectral_density(spectrum, grid, sigma=sigma)
        label = result["label"] if len(results) == 1 else f"{result['label']}: {_summary(result)}"
        axes.semilogy(grid, density, color=colour, linewidth=1.3, label=label)
        axes.fill_between(grid, density, 1e-300, color=colour, alpha=0.12, linewidth=0)
    peak = max(float(line.get_ydata().max()) for line in axes.lines)
    least = min(_single_height(result, sigma) for result in results)
    axes.axhline(least, color="grey", linewidth=0.8, linestyle=":")
    beside = axes.get_yaxis_transform()
    axes.text(1.005, least, "one\neigenvalue", transform=beside, va="center", fontsize=8, color="grey")
    axes.set(xlabel="eigenvalue of the Hessian (stems: the top ones)", ylabel="density (log scale)")
    _mark_top(axes, results, colours, sigma=sigma)
    axes.set_ylim(least / 20, peak * 3)
    axes.grid(alpha=0.25)
    axes.set_title(_title(results), fontsize=10)
    if len(results) > 1:
        axes.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    return figure


def _quadratures(result: dict[str, Any]) -> list[Quadrature]:
    return [
        Quadrature(**{name: torch.tensor(values, dtype=torch.float64) for name, values in quadrature.items()})
        for quadrature in result["quadratures"]
    ]


def _single_height(result: dict[str, Any], sigma: float) -> float:
    """The smoothed density's height at an eigenvalue that stands alone: what lies far below is smoothing only."""
    return 1 / (int(result["parameters"]) * sigma * math.sqrt(2 * math.pi))


def _mark_top(axes: Any, results: Sequence[dict[str, Any]], colours: Sequence[str], *, sigma: float) -> None:
    """A stem for each top eigenvalue that is known: the density may miss one that its start vectors hardly touch."""
    for colour, result in zip(colours, results, strict=True):
        values = [pair["value"] for pair in result["top_eigenvalues"]]
        height = _single_height(result, sigma)
        axes.vlines(values, 1e-300, height, color=colour, linewidth=1)
        axes.plot(values, [height] * len(values), "o", color=colour, markersize=4)


def _summary(result: dict[str, Any]) -> str:
    trace, error = result["trace"]["mean"], result["trace"]["standard_error"]
    spread = "" if error is None else f" ± {error:,.3g}"
    return f"top eigenvalue {result['top_eigenvalues'][0]['value']:,.4g}, trace {trace:,.4g}{spread}"


def _title(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]
    data = f"{first['data']['sequences']} validation sequences, {first['data']['tokens']:,} tokens"
    if len(results) > 1:
        return f"Spectral density of the Hessian of the loss on {data}"
    return f"{first['label']}, loss {first['loss']:.3f} on {data}\n{_summary(first)}"
