# SPDX-License-Identifier: Apache-2.0
"""Pictures of losses: best by batch, curves, ablations.

Losses are in nats a token; batches in sequences a step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merit_ds.lab.figures import (
    end_labels,
    ink,
    label_left,
    legend,
    look,
    ordered,
    panels,
    sparse,
    style,
    whole_steps,
)
from merit_ds.lab.report_statistics import Best, Summary, signed, smooth, winner

LOSS = "final validation loss (nats a token)"
_WORSE, _BETTER = "#9aa5b1", "#8fc1a9"
Curve = Sequence[tuple[int, float]]


def draw_best(groups: Mapping[int, Mapping[str, Best]]) -> Any:
    """A panel for each batch, each with its own axis: a slot for each optimizer that is there, with the mean over seeds
    and its value, hollow where one seed alone gave a loss, and beside it each seed and their range."""
    figure, every = panels(len(groups), height=4.2)
    for axes, (batch, group) in zip(every, groups.items(), strict=True):
        best = winner({name: found.summary for name, found in group.items()})
        names = ordered(group)
        for slot, name in enumerate(names):
            _best_mark(axes, slot, name, group[name], leads=name == best)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        for label, name in zip(axes.get_xticklabels(), names, strict=True):
            label.set_color(ink(name))
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.grid(visible=False, axis="x")
        low = min(found.summary.low for found in group.values())
        high = max(found.summary.high for found in group.values())
        room = (high - low) or 0.1
        axes.set_ylim(low - 0.08 * room, high + 0.2 * room)  # the values stand upright above their marks
        axes.set_title(f"batch {batch:,}")
        label_left(axes, LOSS)
    return figure


def _best_mark(axes: Any, slot: int, name: str, best: Best, *, leads: bool) -> None:
    from matplotlib.transforms import ScaledTranslation

    colour, mark = look(name)
    summary = best.summary
    if summary.finite > 1:
        finite = [loss for loss in best.losses.values() if math.isfinite(loss)]
        # Behind the mark a narrow range would not be seen.
        beside = axes.transData + ScaledTranslation(9 / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot([slot] * 2, [summary.low, summary.high], color=colour, linewidth=2.5, alpha=0.4, transform=beside)
        axes.plot([slot] * len(finite), finite, "_", color=colour, markersize=6, markeredgewidth=1.2, transform=beside)
    size, fill = style(name)["markersize"] + 1, colour if summary.finite > 1 else "white"
    axes.plot(slot, summary.mean, mark, color=colour, markersize=size, markerfacecolor=fill, zorder=3)
    text = f"{summary.mean:.3f}" + (f" ({summary.diverged} lost)" if summary.diverged else "")
    axes.annotate(
        text,
        (slot, summary.mean),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=90,
        fontsize=8.5,
        color=ink(name),
        fontweight="bold" if leads else "normal",
    )


def draw_curves(curves: Mapping[int, Mapping[str, tuple[int, Curve, Curve]]]) -> Any:
    """A panel for each batch: training loss, smoothed and thin, and validation loss with marks, for each optimizer.

    Args:
        curves: batch to optimizer to the run's seed, training curve and validation curve.
    """
    figure, every = panels(len(curves), height=3.4)
    for axes, (batch, by_name) in zip(every, curves.items(), strict=True):
        ends, seen = [], []
        for name in ordered(by_name):
            seed, training, validation = by_name[name]
            smoothed = smooth([loss for _, loss in training], reach=max(1, len(training) // 25))
            axes.plot([s for s, _ in training], smoothed, color=look(name)[0], linewidth=0.9, alpha=0.55)
            axes.plot([s for s, _ in validation], [v for _, v in validation], **sparse(name, len(validation)))
            last = next(((s, v) for s, v in reversed(validation) if math.isfinite(v)), None)
            if last:
                ends.append((f"{name} {last[1]:.3f} ({seed})", last[0], last[1], ink(name)))
            seen += [(s, v) for s, v in (*validation, *zip((s for s, _ in training), smoothed, strict=True))]
        _zoom(axes, seen)
        axes.set_title(f"batch {batch:,}")
        whole_steps(axes)
        label_left(axes, "loss (nats a token)")
        end_labels(axes, ends)
    return figure


def _zoom(axes: Any, seen: Sequence[tuple[int, float]]) -> None:
    """Leave out of sight the steep first fifth, which would flatten all that follows."""
    finite = [(step, loss) for step, loss in seen if math.isfinite(loss)]
    if finite:
        last = max(step for step, _ in finite)
        late = [loss for step, loss in finite if step >= 0.2 * last]
        low, high = min(late), max(late)
        room = (high - low) * 0.06 or 0.05
        axes.set_ylim(low - room, high + room)


def draw_ablations(groups: Mapping[int, Mapping[str, Summary]], *, full: str) -> Any:
    """A panel for each batch, each with its own axis: how much higher an ablation's final loss is than the full
    optimizer's, seed by seed."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    sums: dict[str, float] = {}
    for group in groups.values():
        for label, summary in group.items():
            sums[label] = sums.get(label, 0.0) + summary.mean
    labels = sorted(sums, key=lambda label: -sums[label])
    figure, every = panels(len(groups), height=1.2 + 0.42 * len(labels), share_y=True)
    for axes, (batch, group) in zip(every, groups.items(), strict=True):
        bounds = [0.0, *(bound for s in group.values() if s.finite for bound in (s.low, s.high))]
        low, high = min(bounds), max(bounds)
        room = max((high - low) * 0.3, 0.003)  # a smaller difference shall not fill the panel
        axes.axvline(0, color=look(full)[0], linewidth=1.6)
        for row, label in enumerate(labels):
            if label in group:
                _ablation_bar(axes, row, group[label], place=room * 0.1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(low - (room if low < 0 else 0.3 * room), high + room)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axes.set(title=f"batch {batch:,}", xlabel=f"final loss minus {full}'s (nats a token)")
    signs = [
        Line2D([], [], color=look(full)[0], label=full),
        Patch(color=_WORSE, label="a higher loss"),
        Patch(color=_BETTER, label="a lower loss"),
    ]
    legend(figure, [], extra=signs)
    return figure


def _ablation_bar(axes: Any, row: int, summary: Summary, *, place: float) -> None:
    if not summary.finite:
        axes.text(place, row, "diverged on every seed", va="center", fontsize=8.5, color="#b3261e")
        return
    worse = summary.mean > 0
    axes.barh(row, summary.mean, height=0.56, color=_WORSE if worse else _BETTER)
    axes.plot([summary.low, summary.high], [row, row], color="#1f2933", linewidth=1.3, marker="|", markersize=7)
    text = signed(summary.mean) + (f" ({summary.diverged} diverged)" if summary.diverged else "")
    right = max(summary.high, 0) + place if worse else min(summary.low, 0) - place
    axes.text(right, row, text, va="center", ha="left" if worse else "right", fontsize=8.5)


def draw_models(groups: Mapping[int, Mapping[str, Mapping[str, Best]]]) -> Any:
    """A panel for each batch: the models stand side by side, and a line for each optimizer leads from one to the next.

    Args:
        groups: batch to optimizer to model to what the optimizer came to with it.
    """
    figure, every = panels(len(groups), height=4.0)
    for axes, (batch, group) in zip(every, groups.items(), strict=True):
        labels = list(dict.fromkeys(label for models in group.values() for label in models))
        ends = []
        for name in ordered(group):
            points = [(labels.index(label), best.summary) for label, best in group[name].items()]
            axes.plot([x for x, _ in points], [summary.mean for _, summary in points], **style(name))
            for x, summary in points:
                axes.plot([x, x], [summary.low, summary.high], color=look(name)[0], linewidth=6, alpha=0.28)
            x, last = points[-1]
            ends.append((f"{name} {last.mean:.3f}", x, last.mean, ink(name)))
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.3, len(labels) - 0.7)
        axes.grid(visible=False, axis="x")
        axes.set_title(f"batch {batch:,}")
        label_left(axes, LOSS)
        end_labels(axes, ends, fontsize=9)
    return figure
