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
Curve = Sequence[tuple[int, float]]


def draw_best(groups: Mapping[int, Mapping[str, Best]]) -> Any:
    """For each batch a group of optimizers: the mean over seeds with its value, each seed, and their range."""
    names = ordered(name for group in groups.values() for name in group)
    figure, (axes,) = panels(1, height=4.0)
    figure.set_size_inches(10.4, 4.5)
    step = min(0.8 / max(len(names), 1), 0.2)
    for position, group in enumerate(groups.values()):
        best = winner({name: found.summary for name, found in group.items()})
        for name, found in group.items():
            x = position + (names.index(name) - (len(names) - 1) / 2) * step
            _best_mark(axes, x, name, found, leads=name == best)
    axes.set_xticks(range(len(groups)), [f"{batch:,} sequences" for batch in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="batch", ylabel=LOSS)
    lows, highs = zip(*((b.summary.low, b.summary.high) for g in groups.values() for b in g.values()), strict=True)
    room = (max(highs) - min(lows)) or 0.1
    axes.set_ylim(min(lows) - 0.08 * room, max(highs) + 0.2 * room)  # the values stand upright above their marks
    for border in range(1, len(groups)):
        axes.axvline(border - 0.5, color="#d6dbe1", linewidth=0.8)
    legend(figure, names)
    return figure


def _best_mark(axes: Any, x: float, name: str, best: Best, *, leads: bool) -> None:
    colour, mark = look(name)
    summary = best.summary
    axes.plot([x, x], [summary.low, summary.high], color=colour, linewidth=6, alpha=0.28, solid_capstyle="round")
    for loss in best.losses.values():
        if summary.finite > 1 and math.isfinite(loss):
            axes.plot(x, loss, "_", color=colour, markersize=9, markeredgewidth=1)
    axes.plot(x, summary.mean, mark, color=colour, markersize=style(name)["markersize"] + 1, zorder=3)
    text = f"{summary.mean:.3f}" + (f" ({summary.diverged} lost)" if summary.diverged else "")
    axes.annotate(
        text,
        (x, summary.high),
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
    """A panel for each batch: how much higher an ablation's final loss is than the full optimizer's, seed by seed."""
    sums: dict[str, float] = {}
    for group in groups.values():
        for label, summary in group.items():
            sums[label] = sums.get(label, 0.0) + summary.mean
    labels = sorted(sums, key=lambda label: -sums[label])
    figure, every = panels(len(groups), height=0.9 + 0.42 * len(labels), share_y=True)
    finite = [bound for g in groups.values() for s in g.values() if s.finite for bound in (s.low, s.high)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    room = max((high - low) * 0.22, 0.003)  # a smaller difference shall not fill the panel
    for axes, (batch, group) in zip(every, groups.items(), strict=True):
        axes.axvline(0, color=look(full)[0], linewidth=1.6)
        for row, label in enumerate(labels):
            if label in group:
                _ablation_bar(axes, row, group[label], place=room * 0.12)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(low - (room if low < 0 else 0.3 * room), high + room)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set(title=f"batch {batch:,}", xlabel=f"final loss minus {full}'s (nats a token)")
    return figure


def _ablation_bar(axes: Any, row: int, summary: Summary, *, place: float) -> None:
    if not summary.finite:
        axes.text(place, row, "diverged on every seed", va="center", fontsize=8.5, color="#b3261e")
        return
    worse = summary.mean > 0
    axes.barh(row, summary.mean, height=0.56, color="#9aa5b1" if worse else "#8fc1a9")
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
