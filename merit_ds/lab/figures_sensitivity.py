# SPDX-License-Identifier: Apache-2.0
"""The picture of final loss against peak learning rate."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from merit_ds.lab.figures import GREY, label_left, legend, look, ordered, panels, style
from merit_ds.lab.report_statistics import Best, Outcome, losses_by_lr

_ABOVE = r"$\uparrow$"
"""Mark of a loss above the axis: no optimizer's."""
_MARK = 9
"""Points that a mark over the axes is high."""
_A_DOUBLING = 4
"""Marks over the axes that fit side by side where the learning rate doubles."""


def draw_sensitivity(grids: Mapping[int, Mapping[str, tuple[Sequence[Outcome], Best]]]) -> Any:
    """A panel for each batch: final loss against the peak learning rate over the optimizer's best one, as the rates of
    different optimizers lie decades apart; diverged and too high ones over the upper edge."""
    from matplotlib.ticker import FuncFormatter

    figure, every = panels(len(grids), height=3.8)
    highest = 0
    for axes, grid in zip(every, grids.values(), strict=True):
        bottom, top = loss_window([outcome.loss for outcomes, _ in grid.values() for outcome in outcomes])
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom, top)
        ratios = [outcome.lr / best.lr for outcomes, best in grid.values() for outcome in outcomes]
        axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
        axes.axvline(1, color=GREY, linewidth=0.8)
        above: dict[int, list[tuple[str, Outcome, float]]] = {}
        for name in ordered(grid):
            outcomes, best = grid[name]
            _line(axes, name, outcomes, best)
            for outcome in outcomes:
                if outcome.loss > top:
                    ratio = outcome.lr / best.lr
                    above.setdefault(round(_A_DOUBLING * math.log2(ratio)), []).append((name, outcome, ratio))
        _marks_above(axes, above.values())
        highest = max([highest, *map(len, above.values())])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: str(Fraction(ratio).limit_denominator(4096))))
        axes.set_xlabel("peak learning rate / the optimizer's best one")
        label_left(axes, "final validation loss (nats a token)")
    for axes, batch in zip(every, grids, strict=True):
        axes.set_title(f"batch {batch:,}", pad=6 + _MARK * highest)
    legend(figure, ordered(name for grid in grids.values() for name in grid), extra=_signs())
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


def _line(axes: Any, name: str, outcomes: Sequence[Outcome], best: Best) -> None:
    """The mean over the seeds of the choice; hollow where a learning rate lacks some of these, so that it was not
    compared over them: the mean over those it has."""
    line, hollow = [], []
    for lr, by_seed in losses_by_lr(outcomes).items():
        whole = by_seed.keys() >= set(best.chosen_on)
        mean = fmean(by_seed[seed] for seed in (best.chosen_on if whole else by_seed))
        line.append((lr / best.lr, mean if math.isfinite(mean) else math.nan))
        if not whole:
            hollow.append(line[-1])
    axes.plot(*zip(*line, strict=True), **style(name))
    if hollow:
        axes.plot(*zip(*hollow, strict=True), **style(name) | {"linestyle": "", "markerfacecolor": "white"})


def _signs() -> list[Any]:
    """The legend's entries that are no optimizer's."""
    from matplotlib.lines import Line2D

    signs: tuple[tuple[str, dict[str, Any]], ...] = (
        ("lacks seeds", {"marker": "o", "markersize": 5.5, "markerfacecolor": "white"}),
        ("diverged", {"marker": "x", "markersize": 7, "markeredgewidth": 2}),
        ("above the axis", {"marker": _ABOVE, "markersize": 8}),
    )
    return [Line2D([], [], color=GREY, linestyle="", label=label, **mark) for label, mark in signs]


def _marks_above(axes: Any, above: Iterable[Sequence[tuple[str, Outcome, float]]]) -> None:
    """Marks outside the axes, one over the other where several have about the same place: inside they would look like
    losses."""
    top = axes.get_ylim()[1]
    for found in above:
        for place, (name, outcome, ratio) in enumerate(found):
            mark = {"marker": _ABOVE} if math.isfinite(outcome.loss) else {"marker": "x", "linewidths": 2}
            axes.scatter(
                [ratio], [top], s=42, color=look(name)[0], clip_on=False, zorder=4, transform=_up(axes, place), **mark
            )


def _up(axes: Any, place: int) -> Any:
    """Data coordinates, moved up by a mark's height for each place, and by half of one."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(0, _MARK * (place + 0.6) / 72, axes.figure.dpi_scale_trans)
