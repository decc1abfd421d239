# SPDX-License-Identifier: Apache-2.0
"""The picture of the optimizer steps that a loss takes, against batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merit_ds.lab.figures import GREY, end_labels, ink, label_left, number_axis, ordered, panels, style
from merit_ds.lab.report_statistics import ideal_steps

Steps = Mapping[str, Mapping[int, float]]
"""Optimizer to batch to steps."""


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    loss: float
    why: str
    """Where the loss comes from."""
    sound: Steps
    early: Steps
    """Of these runs, where a loss is passed so early that the step says little."""


def draw_steps(goals: Sequence[Panel]) -> Any:
    """A panel for each loss: steps to it against batch, both logarithmic, with the line of ideal scaling."""
    figure, every = panels(len(goals), height=4.2)
    if len(goals) == 1:
        figure.set_size_inches(10.4, 5.0)
    for axes, panel in zip(every, goals, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends = _lines(axes, panel)
        ends.append(_ideal(axes, panel))
        low, high = min(axes.dataLim.intervaly), max(axes.dataLim.intervaly)
        axes.set_ylim(low / 1.25, high * 1.25)
        batches = sorted({batch for steps in (panel.sound, panel.early) for found in steps.values() for batch in found})
        number_axis(axes.xaxis, batches)
        number_axis(axes.yaxis, [low, high], limit=0)
        axes.set_title(f"to a loss of {panel.loss:g}")
        axes.set_title(panel.why, loc="right", fontsize=8, fontweight="normal", color="#4b5563")
        axes.set_xlabel("batch (sequences a step)")
        label_left(axes, "optimizer steps")
        end_labels(axes, ends, fontsize=9)
    return figure


def _lines(axes: Any, panel: Panel) -> list[tuple[str, float, float, str]]:
    """A line for each optimizer, hollow marks where it passes the loss early; its name at the end."""
    ends: list[tuple[str, float, float, str]] = []
    for name in ordered({**panel.sound, **panel.early}):
        early, found = panel.early.get(name, {}), sorted(panel.sound.get(name, {}).items())
        hollow = style(name) | {"linestyle": "", "markerfacecolor": "white"}
        axes.plot(list(early), list(early.values()), **hollow)
        if found:
            axes.plot(*zip(*found, strict=True), **style(name))
            ends.append((name, *found[-1], ink(name)))
    return ends


def _ideal(axes: Any, panel: Panel) -> tuple[str, float, float, str]:
    """The line on which twice the batch needs half the steps, from the fewest at the smallest batch; an optimizer
    that was run at one batch alone does not set it."""
    lines = [found for found in panel.sound.values() if len(found) > 1] or list(panel.sound.values())
    batches = sorted({batch for found in lines for batch in found})
    fewest = min(found[batches[0]] for found in lines if batches[0] in found)
    ideal = [ideal_steps(fewest, batch=batches[0], at=batch) for batch in batches]
    axes.plot(batches, ideal, linestyle=(0, (4, 3)), color=GREY, linewidth=1.3, zorder=1)
    return "ideal scaling", batches[-1], ideal[-1], GREY
