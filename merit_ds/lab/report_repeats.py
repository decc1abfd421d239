# SPDX-License-Identifier: Apache-2.0
"""The report's section on settings that were run more than once: what a difference of losses is worth."""

from collections.abc import Sequence

from merit_ds.lab.figures import look
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, Section, Table, cell
from merit_ds.lab.report_runs import Run


def repeats_section(runs: Sequence[Run], links: Links) -> Section | None:
    """Runs that share model, corpus, budget, optimizer with its settings, batch, learning rate and seed.

    Args:
        runs: all of them, those that count nowhere else since another is there included.
    """
    points: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.loss is not None and run.family.settings:
            same = (run.family.settings, run.family.tokens, run.optimizer, run.variant, run.batch, run.lr, run.seed)
            points.setdefault(same, []).append(run)
    repeated = [found for found in points.values() if len(found) > 1]
    repeated.sort(key=lambda found: (found[0].name, found[0].batch, found[0].lr, found[0].seed))
    if not repeated:
        return None
    section = Section("The same run again", "repeats")
    section.text.append(
        "Runs of one setting and one seed differ by rounding alone: another device, version, revision (in the list of "
        "runs) or order of sums. A difference between optimizers that is no larger than that says nothing."
    )
    columns = ["optimizer", "batch", "lr", "seed", "spread", "runs (loss, device, torch)"]
    section.parts.append(Table("Settings that were run more than once", columns, [_row(f, links) for f in repeated]))
    return section


def _row(runs: Sequence[Run], links: Links) -> list[Cell]:
    first = runs[0]
    losses = [run.loss for run in runs if run.loss is not None]
    parts: list[tuple[str, str | None]] = []
    for run in runs:
        versions = run.result.get("versions")
        torch = f", torch {versions['torch']}" if isinstance(versions, dict) and versions.get("torch") else ""
        text = f"{run.study}: {run.loss:.4f}"
        parts += [("; " if parts else "", None), (text, links.run(run)), (f" {run.result.get('device')}{torch}", None)]
    return [
        cell(first.name, colour=look(first.optimizer)[0]),
        cell(f"{first.batch:,}"),
        cell(f"{first.lr:g}"),
        cell(first.seed),
        cell(f"{max(losses) - min(losses):.4f}"),
        Cell(tuple(parts)),
    ]
