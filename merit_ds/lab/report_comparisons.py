# SPDX-License-Identifier: Apache-2.0
"""The report's sections that compare runs at their best learning rates: steps to a loss, and curves."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from merit_ds.lab import figures_loss
from merit_ds.lab.figures import look
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Family, Run
from merit_ds.lab.report_statistics import Crossing, default_target, ideal_steps, is_early, steps_to_loss
from merit_ds.lab.study import slug

Found = Mapping[tuple[str, int], tuple[Crossing | None, Sequence[tuple[Run, Crossing | None]]]]
"""Optimizer and batch to the mean crossing and each seed's."""


def steps_section(tuned: Sequence[Tuned], links: Links, *, target: float | None) -> Section | None:
    """Steps to a loss against batch, where there is more than one batch and the curves are there.

    Args:
        target: the loss in nats a token; None: the worst final loss of all runs at their best learning rates.
    """
    section = Section("Steps to a given loss", "steps")
    section.text.append(
        "How many optimizer steps the runs at each optimizer's best learning rate need until their validation loss "
        "first reaches one and the same value, by straight lines between two evaluations. Twice the batch at best "
        "halves the steps (dashed). All runs of a batch decay their learning rate over the same token budget, so this "
        "is when a full run passes the loss, not the fewest steps in which it could be reached."
    )
    for family, batches in by_family(tuned).items():
        finals = [run.curve("valid_loss")[-1][1] for g in batches.values() for t in g.values() for run in _measured(t)]
        goal = default_target(finals) if target is None else target
        if goal is None or len(batches) < 2:
            continue
        found = {(t.optimizer, batch): _crossings(t, goal) for batch, g in batches.items() for t in g.values()}
        section.warnings += _early_warning(family, found, goal)
        crossings: dict[str, dict[int, Crossing]] = {}
        for (name, batch), (crossing, _) in found.items():
            if crossing:
                crossings.setdefault(name, {})[batch] = crossing
        if not crossings:
            section.warnings.append(f"{family.title}: no run reaches a validation loss of {goal:g}.")
            continue
        why = "set by --target-loss" if target is not None else "the worst final loss among the best runs"
        section.parts.append(
            Plot(
                f"steps-{slug(family.title)}",
                f"{family.title}: steps to a validation loss of {goal:g} ({why}) against batch; mean over seeds. “≤”: "
                "the first evaluation already lay below. The dashed line starts at the fewest steps of any optimizer "
                "at the smallest batch. Beside the paper's figure 1.",
                partial(figures_loss.draw_steps, crossings, target=goal),
            )
        )
        section.parts.append(_steps_table(family, batches, found, goal, links))
    return section if section.parts or section.warnings else None


def _measured(one: Tuned) -> list[Run]:
    """The finished runs at the best learning rate whose validation curves are there."""
    return [run for run in one.at_best if math.isfinite(run.loss or 0.0) and run.curve("valid_loss")]


def _crossings(one: Tuned, target: float) -> tuple[Crossing | None, list[tuple[Run, Crossing | None]]]:
    """The mean over seeds, None if any does not reach it, and each seed's."""
    each = [(run, steps_to_loss(run.curve("valid_loss"), target)) for run in _measured(one)]
    reached = [crossing for _, crossing in each if crossing]
    if not reached or len(reached) < len(one.at_best):
        return None, each
    return Crossing(fmean(c.step for c in reached), any(c.at_most for c in reached)), each


def _early_warning(family: Family, found: Found, goal: float) -> list[str]:
    early: dict[str, list[str]] = {}
    for (name, batch), (_, each) in found.items():
        if any(crossing and is_early(run.curve("valid_loss"), crossing) for run, crossing in each):
            early.setdefault(name, []).append(f"{batch:,}")
    if not early:
        return []
    where = "; ".join(f"{name} at batch {', '.join(batches)}" for name, batches in early.items())
    return [
        f"{family.title}: {where}: a loss of {goal:g} is passed in the first tenth of the run or before its second "
        "evaluation, where steps say little of how well it trains; give a lower --target-loss."
    ]


def _steps_table(
    family: Family,
    batches: dict[int, dict[str, Tuned]],
    found: Found,
    goal: float,
    links: Links,
) -> Table:
    rows = []
    first = min(batches)
    for batch, group in batches.items():
        for name, one in group.items():
            crossing, each = found[name, batch]
            start, _ = found.get((name, first), (None, []))
            parts: list[tuple[str, str | None]] = []
            for run, reached in each:
                parts += [(", " if parts else "", None), (f"{run.seed}: {_steps_text(reached)}", links.run(run))]
            efficiency = "-"
            if crossing and start and not crossing.at_most and not start.at_most:
                efficiency = f"{ideal_steps(start.step, batch=first, at=batch) / crossing.step:.0%}"
            rows.append(
                [
                    cell(f"{batch:,}"),
                    cell(name, colour=look(name)[0]),
                    cell(f"{one.best.lr:g}" if one.best else "-"),
                    cell(_steps_text(crossing)),
                    Cell(tuple(parts) or (("-", None),)),
                    cell(efficiency),
                ]
            )
    columns = ["batch", "optimizer", "lr", "steps", "seeds (steps)", f"of ideal, from batch {first:,}"]
    note = (
        "Of ideal: the steps that perfect scaling from the optimizer's own smallest batch would need, over those taken."
    )
    return Table(f"{family.title}: steps to a validation loss of {goal:g}", columns, rows, note)


def _steps_text(crossing: Crossing | None) -> str:
    if crossing is None:
        return "not reached"
    return f"{'≤ ' if crossing.at_most else ''}{crossing.step:,.0f}"


def curves_section(tuned: Sequence[Tuned], links: Links) -> Section | None:
    """Training and validation loss of one run of each optimizer at its best learning rate."""
    section = Section("Loss curves", "curves")
    section.text.append(
        "For each optimizer the run at its best learning rate whose final loss is nearest to the mean over seeds. "
        "Thin: training loss, smoothed; with marks: validation loss. The steep first fifth is out of sight."
    )
    for family, batches in by_family(tuned).items():
        curves = {}
        for batch, group in batches.items():
            shown = {name: one.shown for name, one in group.items()}
            curves[batch] = {
                name: (run.seed, run.curve("loss"), run.curve("valid_loss"))
                for name, run in shown.items()
                if run and run.metrics
            }
        curves = {batch: found for batch, found in curves.items() if found}
        if not curves:
            continue
        section.parts.append(
            Plot(
                f"curves-{slug(family.title)}",
                f"{family.title}: loss against steps, a panel for each batch; at the end this run's final validation "
                "loss, in brackets its seed.",
                partial(figures_loss.draw_curves, curves),
            )
        )
        rows = [_curve_row(batch, group, links) for batch, group in batches.items()]
        section.parts.append(Table(f"{family.title}: the runs that are drawn", ["batch", "runs"], rows))
    return section if section.parts else None


def _curve_row(batch: int, group: dict[str, Tuned], links: Links) -> list[Cell]:
    parts: list[tuple[str, str | None]] = []
    for name, one in group.items():
        if one.shown:
            text = f"{name} lr {one.shown.lr:g} seed {one.shown.seed}"
            parts += [(", " if parts else "", None), (text, links.run(one.shown))]
    return [cell(f"{batch:,}"), Cell(tuple(parts) or (("-", None),))]
