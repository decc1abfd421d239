# SPDX-License-Identifier: Apache-2.0
"""The report's section on ablations: each variant of an optimizer against the full one."""

from collections.abc import Sequence
from functools import partial

from merit_ds.lab import figures_loss
from merit_ds.lab.figures import look, ordered
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family, outcomes, seeds_cell
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Family, Run
from merit_ds.lab.report_statistics import Summary, losses_by_lr, paired_difference, signed, summarize
from merit_ds.lab.study import slug


def ablations_section(runs: Sequence[Run], tuned: Sequence[Tuned], links: Links) -> Section | None:
    """Each variant's loss minus the full optimizer's at the latter's best rate, a figure for each full optimizer."""
    section = Section("Ablations", "ablations")
    section.text.append(
        "What the final loss becomes when a part of the optimizer is taken out or exchanged: the difference to the "
        "full one at the full one's best learning rate, seed by seed. Above zero the part helps; a range across zero "
        "leaves it open. Rates at which only the variants ran are listed without a difference."
    )
    variants = [run for run in runs if run.variant is not None]
    for family, batches in by_family(tuned).items():
        for full in ordered(run.optimizer for run in variants if run.family == family):
            groups: dict[int, dict[str, Summary]] = {}
            rows: list[list[Cell]] = []
            for batch in sorted({r.batch for r in variants if (r.family, r.optimizer) == (family, full)}):
                here = [r for r in variants if (r.family, r.optimizer, r.batch) == (family, full, batch)]
                base = batches.get(batch, {}).get(full)
                differences = _differences(here, base)
                rows += _rows(here, base, differences, links)
                if differences:
                    groups[batch] = differences
            if groups:
                section.parts.append(_plot(family, full, groups))
            if rows:
                columns = ["batch", "variant", "lr", "mean loss", f"minus {full}", "min to max", "seeds (loss)"]
                section.parts.append(Table(f"{family.title}: {full} and its ablations", columns, rows))
    return section if section.parts else None


def _plot(family: Family, full: str, groups: dict[int, dict[str, Summary]]) -> Plot:
    return Plot(
        f"ablations-{slug(family.title)}-{slug(full)}",
        f"{family.title}: final validation loss of each ablation minus that of {full} (line at 0) at the latter's best "
        "learning rate; bar: mean over seeds, whisker: their range. Beside the paper's figure 9.",
        partial(figures_loss.draw_ablations, groups, full=full),
    )


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (str(run.variant), run.lr, run.seed)):
        found.setdefault(str(run.variant), []).append(run)
    return found


def _differences(variants: Sequence[Run], base: Tuned | None) -> dict[str, Summary]:
    """Variant to its difference from the full optimizer at the latter's best rate; without those that lack a seed."""
    best = base.best if base else None
    found = {}
    for variant, runs in _by_variant(variants).items():
        here = losses_by_lr(outcomes(runs)).get(best.lr) if best else None
        difference = paired_difference(here, best.losses) if best and here else None
        if difference:
            found[variant] = difference
    return found


def _rows(
    variants: Sequence[Run], base: Tuned | None, differences: dict[str, Summary], links: Links
) -> list[list[Cell]]:
    rows = []
    best = base.best if base else None
    if base and best:
        name = cell(f"{base.optimizer} (full)", colour=look(base.optimizer)[0])
        rows.append(_row(base.batch, name, best.lr, base.runs, None, links))
    for variant, runs in _by_variant(variants).items():
        for lr in losses_by_lr(outcomes(runs)):
            difference = differences.get(variant) if best and lr == best.lr else None
            rows.append(_row(runs[0].batch, cell(variant), lr, runs, difference, links))
    return rows


def _row(
    batch: int, name: Cell, lr: float, runs: Sequence[Run], difference: Summary | None, links: Links
) -> list[Cell]:
    at_lr = sorted((run for run in runs if run.lr == lr and run.loss is not None), key=lambda run: run.seed)
    mean = summarize(run.loss for run in at_lr if run.loss is not None)
    finite = difference is not None and difference.finite > 0
    return [
        cell(f"{batch:,}"),
        name,
        cell(f"{lr:g}"),
        cell(f"{mean.mean:.3f}" if mean.finite else "diverged"),
        cell(signed(difference.mean) if difference and finite else "-"),
        cell(f"{signed(difference.low)} to {signed(difference.high)}" if difference and difference.finite > 1 else "-"),
        seeds_cell(at_lr, links),
    ]
