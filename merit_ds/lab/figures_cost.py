# SPDX-License-Identifier: Apache-2.0
"""The picture of what a step costs."""

from collections.abc import Mapping
from typing import Any

from merit_ds.lab.figures import look, ordered, panels, three_digits


def draw_cost(groups: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Any:
    """A panel for each model and batch: seconds a step by optimizer, and its ratio to AdamW's.

    Args:
        groups: panel's title to optimizer to seconds and ratio.
    """
    most = max(len(group) for group in groups.values())
    figure, every = panels(len(groups), height=0.9 + 0.36 * most)
    for axes, (title, group) in zip(every, groups.items(), strict=True):
        names = ordered(group)
        longest = max(seconds for seconds, _ in group.values())
        for row, name in enumerate(names):
            seconds, ratio = group[name]
            axes.barh(row, seconds, height=0.62, color=look(name)[0])
            text = f"{three_digits(seconds)} s" + ("" if ratio is None else f"  x{ratio:.2f}")
            axes.text(seconds + 0.02 * longest, row, text, va="center", fontsize=8.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.42 * longest)
        axes.grid(visible=False, axis="y")
        axes.set(title=title, xlabel="seconds a step")
    return figure
