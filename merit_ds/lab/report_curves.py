# SPDX-License-Identifier: Apache-2.0
"""The report's section on loss curves: one run of each optimizer at its best learning rate."""

from collections.abc import Sequence
from functools import partial

from merit_ds.lab import figures_loss
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.study import slug


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
