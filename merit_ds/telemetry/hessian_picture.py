# SPDX-License-Identifier: Apache-2.0
"""Spectral densities of Hessians as a picture: one, or several over one another."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merit_ds.telemetry.lanczos import Quadrature, spectral_density

_POINTS = 2000
_WIDTH = 0.015
"""The smoothing's standard deviation, as a share of the axis between the outermost nodes drawn."""
_LINEAR = 0.05
"""About up to this share of its largest node, the axis is linear for the flattest of the results."""
_MARGIN = 6
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

    The axis is asinh(eigenvalue / a), linear near 0 and logarithmic far from it, as the largest eigenvalue of one run
    can be many times that of another, and most of a run's lie near 0. The densities are those of asinh(eigenvalue / a),
    smoothed alike, so that equal areas are equal shares of the eigenvalues, wherever and of whichever result.

    Args:
        results: as `measure` returns them; at least one.
        colours: of each; None: matplotlib's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = colours or [f"C{index}" for index in range(len(results))]
    linear = _LINEAR * min(_largest(result) for result in results) or 1.0
    densities = [_quadratures(result, linear=linear) for result in results]
    nodes = torch.cat([quadrature.nodes for spectrum in densities for quadrature in spectrum])
    low, high = float(nodes.min()), float(nodes.max())
    # All nodes alike happens only for a multiple of the identity; any width shows it.
    sigma = _WIDTH * ((high - low) or 1.0)
    grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, _POINTS, dtype=torch.float64)
    eigenvalues = linear * grid.sinh()
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150)
    for colour, result, spectrum in zip(colours, results, densities, strict=True):
        density = spectral_density(spectrum, grid, sigma=sigma)
        label = result["label"] if len(results) == 1 else f"{result['label']}: {_summary(result)}"
        axes.semilogy(eigenvalues, density, color=colour, linewidth=1.3, label=label)
        axes.fill_between(eigenvalues, density, 1e-300, color=colour, alpha=0.12, linewidth=0)
    peak = max(float(line.get_ydata().max()) for line in axes.lines)
    least = min(_single_height(result, sigma) for result in results)
    axes.axhline(least, color="grey", linewidth=0.8, linestyle=":")
    beside = axes.get_yaxis_transform()
    axes.text(1.005, least, "one\neigenvalue", transform=beside, va="center", fontsize=8, color="grey")
    axes.set(xlabel="eigenvalue of the Hessian (stems: the top ones)", ylabel="density along this axis (log scale)")
    _stretch(axes, eigenvalues, linear=linear)
    _mark_top(axes, results, colours, sigma=sigma)
    axes.set_ylim(least / 20, peak * 3)
    axes.grid(alpha=0.25)
    axes.set_title(_title(results), fontsize=10, pad=6 + (13 * len(results) if len(results) > 1 else 0))
    if len(results) > 1:
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.2)
    figure.tight_layout()
    return figure


def _largest(result: dict[str, Any]) -> float:
    """The size of the outermost node."""
    return max(abs(float(node)) for quadrature in result["quadratures"] for node in quadrature["nodes"])


def _quadratures(result: dict[str, Any], *, linear: float) -> list[Quadrature]:
    """With asinh(node / linear) for each node; what is known of the nodes' errors is not drawn."""
    found = [
        {name: torch.tensor(values, dtype=torch.float64) for name, values in quadrature.items()}
        for quadrature in result["quadratures"]
    ]
    return [Quadrature(**one | {"nodes": (one["nodes"] / linear).asinh()}) for one in found]


def _stretch(axes: Any, eigenvalues: torch.Tensor, *, linear: float) -> None:
    """An x axis of asinh(eigenvalue / linear), with plain numbers at 0 and where it is logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("asinh", linear_width=linear)
    axes.set_xlim(float(eigenvalues[0]), float(eigenvalues[-1]))
    powers = range(math.ceil(math.log10(linear / 2)), math.ceil(math.log10(float(eigenvalues.abs().max()))) + 1)
    axes.xaxis.set_major_locator(FixedLocator([0.0] + [sign * 10.0**power for power in powers for sign in (-1, 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
