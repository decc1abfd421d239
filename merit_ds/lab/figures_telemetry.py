# SPDX-License-Identifier: Apache-2.0
"""Pictures of what telemetry sampled: maps of layer and step, one panel for each optimizer on one colour scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, quantiles
from typing import Any

from merit_ds.lab.figures import (
    end_labels,
    ink,
    label_left,
    look,
    number_axis,
    ordered,
    panels,
    sparse,
    two_digits,
    whole_steps,
)

Line = Sequence[tuple[int, float]]
"""(optimizer step, value) of one run; NaN: not known."""
Band = Sequence[tuple[int, float, float, float]]
"""(optimizer step, mean, lowest, highest) over seeds."""


@dataclass(frozen=True)
class LayerMap:
    """A quantity by layer and step of one run."""

    steps: Sequence[int]
    """Optimizer steps of the samples."""
    values: Sequence[Sequence[float]]
    """For each sample one value a layer; NaN: not known."""
    note: str
    """Behind the optimizer's name in the panel's title."""


def draw_maps(
    maps: Mapping[str, LayerMap], *, label: str, percent: bool, logarithmic: bool, floor: float | None = None
) -> Any:
    """Small multiples: step to the right, layer upwards from 0, the same colours for the same value in every panel.

    Args:
        floor: what lies below has one colour, and the colour bar an arrow.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import PercentFormatter

    names = ordered(maps)
    figure, every = panels(len(names), height=2.5)
    finite = [v for one in maps.values() for sample in one.values for v in sample if math.isfinite(v)] or [0.0, 1.0]
    bottom = _bottom(finite, floor)
    low, high = min(finite) if bottom is None else bottom, max(finite)
    wide = logarithmic and low > 0 and high > 8 * low
    if not wide:
        low, high = linear_limits([max(v, low) for v in finite])
    low, high = (0.0 if percent else low), (high if high > low else low + (abs(low) * 0.1 or 0.01))
    norm = LogNorm(low, high) if wide else Normalize(low, high)
    mesh = None
    for axes, name in zip(every, names, strict=True):
        mesh = _panel(axes, maps[name], norm)
        axes.set_title(name, color=ink(name))
        axes.set_title(maps[name].note, loc="right", fontsize=8, fontweight="normal", color="#4b5563")
    below, above = min(finite) < low, max(finite) > high
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(mesh, ax=every, extend=extend, shrink=0.9, aspect=30 if len(names) > 3 else 20, pad=0.015)
    bar.set_label(label)
    if wide:
        number_axis(bar.ax.yaxis, [low, high], limit=0)
    elif percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def linear_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a linear colour scale: the values', but where the outermost fiftieth at an end lies so far out that it
    would take a fifth of the scale or more from all others, these others'."""
    low, high = min(values), max(values)
    if len(values) < 2:
        return low, high
    second, *_, last = quantiles(values, n=50, method="inclusive")
    far = 0.25 * (last - second)
    if far == 0:
        return low, high
    return low if low >= second - far else second, high if high <= last + far else last


def _panel(axes: Any, one: LayerMap, norm: Any) -> Any:
    layers = max(len(sample) for sample in one.values)
    cells = [[sample[layer] if layer < len(sample) else math.nan for sample in one.values] for layer in range(layers)]
    edges = [layer - 0.5 for layer in range(layers + 1)]
    axes.set_facecolor("#d1d5db")  # seen where a value is not known
    mesh = axes.pcolormesh(step_edges(one.steps), edges, cells, norm=norm, cmap="viridis", rasterized=True)
    stride = -(-layers // 8)
    axes.set_yticks(range(0, layers, stride))
    axes.grid(visible=False)
    whole_steps(axes)
    label_left(axes, "layer")
    return mesh


def step_edges(steps: Sequence[int]) -> list[float]:
    """Borders of the cells that stand for samples at `steps`: half way between neighbours."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(one + other) / 2 for one, other in pairwise(steps)]
    return [steps[0] - (middles[0] - steps[0]), *middles, steps[-1] + (steps[-1] - middles[-1])]


def draw_peaks(batches: Mapping[int, Mapping[str, Sequence[Line]]], *, label: str, floor: float | None = None) -> Any:
    """A panel for each batch: for each optimizer the mean over its seeds' lines, and their range as a band.

    Args:
        floor: no axis reaches below it, if something lies above it; a line that ends below has an arrow at its name.
    """
    figure, every = panels(len(batches), height=3.2)
    for axes, (batch, by_name) in zip(every, batches.items(), strict=True):
        axes.set_yscale("log")
        merged = {name: over_seeds(by_name[name]) for name in ordered(by_name)}
        shown = [v for rows in merged.values() for _, *values in rows for v in values if 0 < v < math.inf]
        bottom = _bottom(shown, floor)
        for name, rows in merged.items():
            steps, means, lows, highs = zip(*rows, strict=True)
            axes.plot(steps, means, **sparse(name, len(steps)))
            axes.fill_between(steps, lows, highs, color=look(name)[0], alpha=0.15, linewidth=0)
        axes.set_ylim(bottom=bottom)
        number_axis(axes.yaxis, [v for v in shown if bottom is None or v >= bottom] or [1.0], limit=0)
        axes.set_title(f"batch {batch:,}")
        whole_steps(axes)
        label_left(axes, label)
        end_labels(axes, [_end(name, rows, bottom) for name, rows in merged.items() if math.isfinite(rows[-1][1])])
    return figure


def over_seeds(lines: Sequence[Line]) -> Band:
    """Step, mean, lowest and highest of the seeds that were sampled there; NaN where none is finite."""
    found: dict[int, list[float]] = {}
    for line in lines:
        for step, value in line:
            found.setdefault(step, []).extend([value] if math.isfinite(value) else [])
    nothing = (math.nan,) * 3
    return [(step, *((fmean(v), min(v), max(v)) if v else nothing)) for step, v in sorted(found.items())]


def _end(
    name: str, rows: Sequence[tuple[int, float, float, float]], bottom: float | None
) -> tuple[str, float, float, str]:
    """What stands at the end of the optimizer's line, and where."""
    step, mean, *_ = rows[-1]
    below = bottom is not None and mean < bottom
    return f"{name} {two_digits(mean)}{' ↓' if below else ''}", step, bottom if bottom and below else mean, ink(name)


def _bottom(values: Sequence[float], floor: float | None) -> float | None:
    """The floor, if some of the values lie below it and some above; None: nothing is cut off."""
    return floor if floor is not None and values and min(values) < floor < max(values) else None
