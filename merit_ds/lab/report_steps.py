# SPDX-License-Identifier: Apache-2.0
"""The report's section on steps to a loss: how far a larger batch saves steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from merit_ds.lab.figures import look
from merit_ds.lab.figures_steps import Panel, draw_steps
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run
from merit_ds.lab.report_statistics import Crossing, default_target, ideal_steps, is_early, steps_to_loss
from merit_ds.lab.study import slug

Batches = Mapping[int, Mapping[str, Tuned]]


@dataclass(frozen=True)
class Reached:
    """When an optimizer's runs at one batch reach a loss."""

    mean: Crossing | None
    """Over seeds; None if any does not reach it."""
    each: Sequence[tuple[Run, Crossing | None]]

    @property
    def early(self) -> bool:
        """Whether a seed reaches it so early that its step says little."""
        return any(crossing and is_early(run.curve("valid_loss"), crossing) for run, crossing in self.each)

    @property
    def sound(self) -> Crossing | None:
        return None if self.early else self.mean


@dataclass(frozen=True)
class Goal:
    """A loss to be reached, and when which optimizer reaches it at which batch."""

    loss: float
    why: str
    found: Mapping[tuple[str, int], Reached]

    @property
    def first(self) -> int | None:
        """The smallest batch at which it is reached, and not early."""
        return min((batch for (_, batch), reached in self.found.items() if reached.sound), default=None)


def steps_section(tuned: Sequence[Tuned], links: Links, *, target: float | None) -> Section | None:
    """Steps to a loss against batch, where there is more than one batch and the curves are there.

    Args:
        target: the loss in nats a token; None: for each batch but the smallest the worst final loss of its runs at
            their best learning rates.
    """
    section = Section("Steps to a given loss", "steps")
    section.text.append(
        "How many optimizer steps the runs at each optimizer's best learning rate need until their validation loss "
        "first reaches one and the same value, by straight lines between two evaluations. Twice the batch at best "
        "halves the steps (dashed). All runs of a batch decay their learning rate over the same token budget, so this "
        "is when a full run passes the loss, not the fewest steps in which it could be reached. A loss that is passed "
        "in the first tenth of a run or before its second evaluation (hollow marks, “early” in the tables) says "
        "little of how well the run trains."
    )
    for family, batches in by_family(tuned).items():
        if len(batches) < 2:
            continue
        goals = _own_goals(batches) if target is None else [_goal(batches, target, "set by --target-loss")]
        for goal in goals:
            section.warnings += _warnings(family.title, goal)
        if drawn := [goal for goal in goals if goal.first is not None]:
            section.parts.append(_plot(family.title, drawn))
        section.parts += [_table(family.title, batches, goal, links) for goal in drawn]
    return section if section.parts or section.warnings else None


def _own_goals(batches: Batches) -> list[Goal]:
    """For each batch but the smallest what all of its runs reach, and when these and smaller batches do.

    An optimizer without a smaller batch does not choose the loss: nothing can be said of its scaling, and a bad one
    would put the loss where all others pass it early.
    """
    goals = []
    for batch in sorted(batches)[1:]:
        smaller = {name for other in batches if other < batch for name in batches[other]}
        ends = [
            run.curve("valid_loss")[-1][1]
            for name, one in batches[batch].items()
            if name in smaller
            for run in _measured(one)
        ]
        loss = default_target(ends)
        if loss is not None:
            upto = {other: group for other, group in batches.items() if other <= batch}
            goals.append(_goal(upto, loss, f"the worst final loss at batch {batch:,}"))
    return goals


def _goal(batches: Batches, loss: float, why: str) -> Goal:
    return Goal(
        loss,
        why,
        {(name, batch): _reached(one, loss) for batch, group in batches.items() for name, one in group.items()},
    )


def _measured(one: Tuned) -> list[Run]:
    """The finished runs at the best learning rate whose validation curves are there."""
    return [run for run in one.at_best if math.isfinite(run.loss or 0.0) and run.curve("valid_loss")]


def _reached(one: Tuned, loss: float) -> Reached:
    each = [(run, steps_to_loss(run.curve("valid_loss"), loss)) for run in _measured(one)]
    crossings = [crossing for _, crossing in each if crossing]
    if not crossings or len(crossings) < len(one.at_best):
        return Reached(None, each)
    return Reached(Crossing(fmean(c.step for c in crossings), any(c.at_most for c in crossings)), each)


def _warnings(title: str, goal: Goal) -> list[str]:
    if not any(crossing for reached in goal.found.values() for _, crossing in reached.each):
        return [f"{title}: no run reaches a validation loss of {goal.loss:g}."]
    early: dict[int, list[str]] = {}
    for (name, batch), reached in goal.found.items():
        if reached.early:
            early.setdefault(batch, []).append(name)
    if not early:
        return []
    where = "; ".join(f"at batch {batch:,} {', '.join(early[batch])}" for batch in sorted(early))
    return [f"{title}: a loss of {goal.loss:g} is passed early, which does not count: {where}."]


def _plot(title: str, goals: Sequence[Goal]) -> Plot:
    drawn = []
    for goal in goals:
        sound: dict[str, dict[int, float]] = {}
        early: dict[str, dict[int, float]] = {}
        for (name, batch), reached in goal.found.items():
            if reached.mean:
                (early if reached.early else sound).setdefault(name, {})[batch] = reached.mean.step
        drawn.append(Panel(goal.loss, goal.why, sound, early))
    return Plot(
        f"steps-{slug(title)}",
        f"{title}: steps to a validation loss against batch, a panel for each loss; mean over seeds, hollow: passed "
        "early. The dashed line starts at the fewest steps of any line at the smallest batch. Beside the paper's "
        "figure 1.",
        partial(draw_steps, drawn),
    )


def _table(title: str, batches: Batches, goal: Goal, links: Links) -> Table:
    rows: list[list[Cell]] = []
    for (name, batch), reached in goal.found.items():
        parts: list[tuple[str, str | None]] = []
        for run, crossing in reached.each:
            parts += [(", " if parts else "", None), (f"{run.seed}: {_steps_text(crossing)}", links.run(run))]
        best = batches[batch][name].best
        rows.append(
            [
                cell(f"{batch:,}"),
                cell(name, colour=look(name)[0]),
                cell(f"{best.lr:g}" if best else "-"),
                cell(_steps_text(reached.mean) + (" (early)" if reached.early else "")),
                Cell(tuple(parts) or (("-", None),)),
                cell(_efficiency(goal, name, batch)),
            ]
        )
    columns = ["batch", "optimizer", "lr", "steps", "seeds (steps)", f"of ideal, from batch {goal.first:,}"]
    note = (
        f"Of ideal: the steps that perfect scaling from the optimizer's own at batch {goal.first:,} would need, over "
    )
    return Table(
        f"{title}: steps to a validation loss of {goal.loss:g} ({goal.why})", columns, rows, note + "those taken."
    )


def _efficiency(goal: Goal, name: str, batch: int) -> str:
    if goal.first is None or (name, goal.first) not in goal.found:
        return "-"
    start, end = goal.found[name, goal.first].sound, goal.found[name, batch].sound
    return f"{ideal_steps(start.step, batch=goal.first, at=batch) / end.step:.0%}" if start and end else "-"


def _steps_text(crossing: Crossing | None) -> str:
    if crossing is None:
        return "not reached"
    return f"{'≤ ' if crossing.at_most else ''}{crossing.step:,.0f}"
