# SPDX-License-Identifier: Apache-2.0
"""Pictures of what telemetry sampled: maps of layer and step, one panel for each optimizer on one colour scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from merit_ds.lab.figures import (
    end_labels,
    ink,
    label_left,
    number_axis,
    ordered,
    panels,
    sparse,
    two_digits,
    whole_steps,
)


@dataclass(frozen=True)
class LayerMap:
    """A quantity by layer and step of one run."""

    steps: Sequence[int]
    """Optimizer steps of the samples."""
    values: Sequence[Sequence[float]]
    """For each sample one value a layer; NaN: not known."""
    note: str
    """Behind the optimizer's name in the panel's title."""


def draw_maps(maps: Mapping[str, LayerMap], *, label: str, percent: bool, logarithmic: bool) -> Any:
    """Small multiples: step to the right, layer upwards from 0, the same colours for the same value in every panel."""
    from matplotlib import colors
    from matplotlib.ticker import PercentFormatter

    names = ordered(maps)
    figure, every = panels(len(names), height=2.5)
    finite = [v for one in maps.values() for sample in one.values for v in sample if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    wide = logarithmic and low > 0 and high > 8 * low
    low, high = (0.0 if percent else low), (high if high > low else low + (abs(low) * 0.1 or 0.01))
    norm = colors.LogNorm(low, high) if wide else colors.Normalize(low, high)
    mesh = None
    for axes, name in zip(every, names, strict=True):
        mesh = _panel(axes, maps[name], norm)
        axes.set_title(name, color=ink(name))
        axes.set_title(maps[name].note, loc="right", fontsize=8, fontweight="normal", color="#4b5563")
    bar = figure.colorbar(mesh, ax=every, shrink=0.9, aspect=30 if len(names) > 3 else 20, pad=0.015)
    bar.set_label(label)
    if wide:
        number_axis(bar.ax.yaxis, [low, high], limit=0)
    elif percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


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


def draw_peaks(batches: Mapping[int, Mapping[str, LayerMap]], *, label: str) -> Any:
    """A panel for each batch: the largest value of all layers against steps, a line for each optimizer."""
    figure, every = panels(len(batches), height=3.2)
    for axes, (batch, maps) in zip(every, batches.items(), strict=True):
        ends = []
        for name in ordered(maps):
            peaks = [max((v for v in sample if math.isfinite(v)), default=math.nan) for sample in maps[name].values]
            steps = maps[name].steps
            axes.plot(steps, peaks, **sparse(name, len(steps)))
            if math.isfinite(peaks[-1]):
                ends.append((f"{name} {two_digits(peaks[-1])}", steps[-1], peaks[-1], ink(name)))
        axes.set_yscale("log")
        positive = [v for one in maps.values() for sample in one.values for v in sample if 0 < v < math.inf]
        number_axis(axes.yaxis, positive or [1.0], limit=0)
        axes.set_title(f"batch {batch:,}")
        whole_steps(axes)
        label_left(axes, label)
        end_labels(axes, ends)
    return figure
