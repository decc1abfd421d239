# SPDX-License-Identifier: Apache-2.0
"""The picture of final loss against peak learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merit_ds.lab.figures import GREY, label_left, legend, look, number_axis, ordered, panels, style
from merit_ds.lab.report_statistics import Best, Outcome, losses_by_lr

_ABOVE = r"$\uparrow$"
"""Mark of a loss above the axis: no optimizer's."""
_MARK = 9
"""Points that a mark over the axes is high."""


def draw_sensitivity(grids: Mapping[int, Mapping[str, tuple[Sequence[Outcome], Best | None]]]) -> Any:
    """A panel for each batch: final loss against peak learning rate; diverged and too high ones over the upper edge."""
    from matplotlib.lines import Line2D

    figure, every = panels(len(grids), height=3.8)
    highest = 0
    for axes, grid in zip(every, grids.values(), strict=True):
        outcomes = [outcome for found, _ in grid.values() for outcome in found]
        bottom, top = loss_window([outcome.loss for outcome in outcomes])
        axes.set_xscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xlim(min(o.lr for o in outcomes) / 1.25, max(o.lr for o in outcomes) * 1.25)
        above: dict[float, list[tuple[str, float]]] = {}
        for name in ordered(grid):
            _line(axes, name, *grid[name])
            for outcome in grid[name][0]:
                if outcome.loss > top:
                    above.setdefault(outcome.lr, []).append((name, outcome.loss))
        _marks_above(axes, above)
        number_axis(axes.xaxis, [outcome.lr for outcome in outcomes], limit=5)
        axes.tick_params(axis="x", labelrotation=35)
        highest = max([highest, *map(len, above.values())])
        axes.set_xlabel("peak learning rate")
        label_left(axes, "final validation loss (nats a token)")
    for axes, batch in zip(every, grids, strict=True):
        axes.set_title(f"batch {batch:,}", pad=6 + _MARK * highest)
    extra = [
        Line2D([], [], color=GREY, marker="o", markersize=12, markerfacecolor="none", linestyle="", label="best"),
        Line2D([], [], color=GREY, marker="x", markersize=7, markeredgewidth=2, linestyle="", label="diverged"),
        Line2D([], [], color=GREY, marker=_ABOVE, markersize=8, linestyle="", label="above the axis"),
    ]
    legend(figure, ordered(name for grid in grids.values() for name in grid), extra=extra)
    return figure


def loss_window(losses: Sequence[float]) -> tuple[float, float]:
    """Limits of a loss axis that show the differences between good runs: above the upper one lie the worst tenth at
    most, and only where they would press the others together. Losses that are not finite do not count."""
    ascending = sorted(loss for loss in losses if math.isfinite(loss))
    if not ascending:
        return 0.0, 1.0
    low, high = ascending[0], ascending[-1]
    most = ascending[int(0.9 * (len(ascending) - 1))]
    if high - low > 1.8 * (most - low) > 0:
        high = most
    room = (high - low) * 0.08 or 0.05 * abs(low) or 0.05
    return low - room, high + 1.6 * room


def _line(axes: Any, name: str, outcomes: Sequence[Outcome], best: Best | None) -> None:
    """The mean over the seeds of the choice, single seeds as ticks, and a ring around the best."""
    colour, _ = look(name)
    chosen_on = set(best.chosen_on) if best else set()
    line = []
    for lr, by_seed in losses_by_lr(outcomes).items():
        deciding = [loss for seed, loss in by_seed.items() if seed in chosen_on] or list(by_seed.values())
        mean = sum(deciding) / len(deciding)
        line.append((lr, mean if math.isfinite(mean) else math.nan))
        if len(by_seed) > 1:
            finite = [loss for loss in by_seed.values() if math.isfinite(loss)]
            axes.plot([lr] * len(finite), finite, "_", color=colour, markersize=8, alpha=0.7)
        if best and lr == best.lr:
            axes.plot(lr, mean, "o", color=colour, markersize=13, markerfacecolor="none", markeredgewidth=1.4)
    axes.plot([lr for lr, _ in line], [loss for _, loss in line], **style(name))


def _marks_above(axes: Any, above: Mapping[float, Sequence[tuple[str, float]]]) -> None:
    """Marks outside the axes, one over the other where several have the same learning rate: inside they would look
    like losses."""
    top = axes.get_ylim()[1]
    for lr, found in above.items():
        for place, (name, loss) in enumerate(found):
            mark = {"marker": _ABOVE} if math.isfinite(loss) else {"marker": "x", "linewidths": 2}
            axes.scatter(
                [lr], [top], s=42, color=look(name)[0], clip_on=False, zorder=4, transform=_up(axes, place), **mark
            )


def _up(axes: Any, place: int) -> Any:
    """Data coordinates, moved up by a mark's height for each place, and by half of one."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(0, _MARK * (place + 0.6) / 72, axes.figure.dpi_scale_trans)
