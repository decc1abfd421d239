# SPDX-License-Identifier: Apache-2.0
"""The report's first sections: what each optimizer's grid chose and gave, and how much the learning rate matters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from merit_ds.lab.figures import look, ordered
from merit_ds.lab.figures_loss import draw_best
from merit_ds.lab.figures_sensitivity import draw_sensitivity
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Family, Run
from merit_ds.lab.report_statistics import (
    Best,
    Outcome,
    Summary,
    best_lr,
    overlaps,
    signed,
    winner,
)
from merit_ds.lab.study import slug


@dataclass(frozen=True)
class Tuned:
    """An optimizer's runs at one batch, and what its grid of learning rates chose."""

    family: Family
    batch: int
    optimizer: str
    runs: Sequence[Run]
    best: Best | None

    @property
    def at_best(self) -> list[Run]:
        """The runs with a result at the best learning rate, by seed."""
        lr = self.best.lr if self.best else None
        return sorted((run for run in self.runs if run.lr == lr and run.loss is not None), key=lambda run: run.seed)

    @property
    def shown(self) -> Run | None:
        """Of these the one nearest to their mean, to stand for all in pictures of a single run."""
        finite = [run for run in self.at_best if math.isfinite(run.loss or 0.0)]
        mean = self.best.summary.mean if self.best else 0.0
        return min(finite, key=lambda run: abs((run.loss or 0.0) - mean), default=None)


def outcomes(runs: Sequence[Run]) -> list[Outcome]:
    """What counts in statistics: finished and diverged runs. A failed one, of a full disk say, tells nothing."""
    return [Outcome(run.lr, run.seed, run.loss) for run in runs if run.loss is not None]


def tune(runs: Sequence[Run]) -> list[Tuned]:
    """The full optimizers of all families and batches: families in the order of the runs, optimizers as listed."""
    groups: dict[tuple[Family, int, str], list[Run]] = {}
    for run in runs:
        if run.variant is None:
            groups.setdefault((run.family, run.batch, run.optimizer), []).append(run)
    names = ordered(name for _, _, name in groups)
    families = list(dict.fromkeys(run.family for run in runs))
    keys = sorted(groups, key=lambda key: (families.index(key[0]), key[1], names.index(key[2])))
    return [Tuned(*key, runs=groups[key], best=best_lr(outcomes(groups[key]))) for key in keys]


def by_family(tuned: Sequence[Tuned]) -> dict[Family, dict[int, dict[str, Tuned]]]:
    """Family to batch to optimizer."""
    found: dict[Family, dict[int, dict[str, Tuned]]] = {}
    for one in tuned:
        found.setdefault(one.family, {}).setdefault(one.batch, {})[one.optimizer] = one
    return found


def best_section(tuned: Sequence[Tuned], links: Links) -> Section | None:
    """Best loss by optimizer and batch, with its learning rate and its spread over seeds."""
    section = Section("Best validation loss by optimizer and batch", "best")
    section.text.append(
        "For each optimizer and batch: the final validation loss at the learning rate that gave the lowest one. The "
        "learning rate is chosen on the seeds that every learning rate was run with; rates that came close to it and "
        "were therefore run with more seeds are compared once more over these. Mean and range are over all seeds at "
        "that learning rate. The mean of the fresh seeds leaves those of the choice out: a loss that was chosen for "
        "being low is lower than what another seed will give. Bold: the lowest mean at this batch, of those with "
        "several seeds where there are any. “Not separated” "
        "means that the ranges over seeds overlap, so that the order may be chance; even where they do not, three "
        "seeds against three give a two-sided p of 0.1 at best (2 of 20 orders)."
    )
    for family, batches in by_family(tuned).items():
        found = {batch: {n: t.best for n, t in group.items() if t.best} for batch, group in batches.items()}
        found = {batch: group for batch, group in found.items() if group}
        if not found:
            continue
        section.parts.append(
            Plot(
                f"best-{slug(family.title)}",
                f"{family.title}: final validation loss at each optimizer's best learning rate, a panel for each batch "
                f"on an axis of its own. {_marks(found)} Beside the paper's figure 4 and table 3, of a Llama figure 6.",
                partial(draw_best, found),
            )
        )
        rows = [row for batch in batches for row in _best_rows(batches[batch], links)]
        columns = [
            "batch",
            "optimizer",
            "best lr",
            "mean loss",
            "fresh seeds",
            "min to max",
            "std",
            "seeds (loss)",
            "to the best",
            "remark",
        ]
        section.parts.append(
            Table(f"{family.title}: final validation loss (nats a token)", columns, rows, _table_note(batches))
        )
    section.warnings += [warning for one in tuned for warning in tuning_warnings(one)]
    return section if section.parts else None


def _marks(found: Mapping[int, Mapping[str, Best]]) -> str:
    """What the marks of `draw_best` are, as far as there are such."""
    single = {best.summary.finite == 1 for group in found.values() for best in group.values()}
    if single == {True}:
        return "Hollow marks: one seed each."
    return "Mark: mean over seeds; ticks beside it: single seeds, bar: their range" + (
        "; hollow: one seed." if True in single else "."
    )


def _table_note(batches: dict[int, dict[str, Tuned]]) -> str:
    seeds = {one.best.chosen_on for group in batches.values() for one in group.values() if one.best}
    text = "; ".join(sorted(", ".join(str(seed) for seed in chosen) for chosen in seeds))
    return f"Learning rates were chosen on seed {text}. A seed's loss links to its run's folder."


def _best_rows(group: dict[str, Tuned], links: Links) -> list[list[Cell]]:
    summaries = {name: one.best.summary for name, one in group.items() if one.best}
    leader = winner(summaries)
    rows = []
    for name, one in group.items():
        swatch = cell(name, colour=look(name)[0], strong=name == leader)
        if one.best is None:
            counts = f"no learning rate of {len({run.lr for run in one.runs})} gave a loss"
            rows.append([cell(f"{one.batch:,}"), swatch, *(cell("-") for _ in range(7)), cell(counts)])
            continue
        summary = one.best.summary
        rows.append(
            [
                cell(f"{one.batch:,}"),
                swatch,
                cell(f"{one.best.lr:g}"),
                cell(f"{summary.mean:.3f}", strong=name == leader),
                cell(f"{one.best.fresh.mean:.3f}" if one.best.fresh and one.best.fresh.finite else "-"),
                cell(f"{summary.low:.3f} to {summary.high:.3f}" if summary.finite > 1 else "-"),
                cell("-" if summary.std is None else f"{summary.std:.3f}"),
                seeds_cell(one.at_best, links),
                cell(_gap(summary, summaries.get(leader or ""), leads=name == leader)),
                cell(_remark(one.best, summaries.get(leader or ""), leads=name == leader)),
            ]
        )
    return rows


def seeds_cell(runs: Sequence[Run], links: Links) -> Cell:
    """Each seed with its loss, linked to its run."""
    parts: list[tuple[str, str | None]] = []
    for run in runs:
        loss = "diverged" if run.loss is None or math.isinf(run.loss) else f"{run.loss:.3f}"
        parts += [(", " if parts else "", None), (f"{run.seed}: {loss}", links.run(run))]
    return Cell(tuple(parts))


def _gap(summary: Summary, leader: Summary | None, *, leads: bool) -> str:
    return "-" if leader is None or leads or summary.diverged else signed(summary.mean - leader.mean)


def _remark(best: Best, leader: Summary | None, *, leads: bool) -> str:
    summary, remarks = best.summary, []
    if leads:
        remarks.append("lowest")
    elif leader and not summary.diverged and summary.finite + leader.finite > 2 and overlaps(summary, leader):
        remarks.append("not separated")
    if summary.finite + summary.diverged == 1:
        remarks.append("one seed")
    if summary.diverged:
        remarks.append(f"{summary.diverged} of {summary.finite + summary.diverged} seeds diverged, mean of the others")
    if best.edge:
        remarks.append("only lr tried" if best.edge == "only" else f"{best.edge} lr of the grid")
    return "; ".join(remarks)


def tuning_warnings(one: Tuned) -> list[str]:
    """What makes this optimizer's best loss less than a tuned one's."""
    where = f"{one.family.title}, batch {one.batch:,}, {one.optimizer}"
    best = one.best
    if best is None:
        return [f"{where}: no learning rate gave a finite loss."]
    warnings = []
    if best.edge == "only":
        warnings.append(f"{where}: one learning rate was tried ({best.lr:g}), so it is not tuned.")
    elif best.edge:
        side = "lower" if best.edge == "lowest" else "higher"
        warnings.append(
            f"{where}: the best learning rate {best.lr:g} is the {best.edge} one tried; a {side} one may be better."
        )
    if best.left_out:
        lrs = ", ".join(f"{lr:g}" for lr in best.left_out)
        seeds = ", ".join(str(seed) for seed in best.chosen_on)
        warnings.append(f"{where}: learning rates {lrs} could not compete, since they lack seed {seeds}.")
    return warnings


def sensitivity_section(tuned: Sequence[Tuned], links: Links) -> Section | None:
    """Final loss against learning rate, where some optimizer has more than one."""
    section = Section("Learning-rate sensitivity", "sensitivity")
    section.text.append(
        "Final validation loss against the peak learning rate, as a multiple of the optimizer's best one: rates of "
        "different optimizers lie decades apart, and so the widths of their valleys can be compared. A mark is the "
        "mean over the seeds that the choice was made on; a hollow one lacks some of these and is the mean over those "
        "that it has. A flat valley forgives a wrong learning rate; a best one at the end of its line is not yet found."
    )
    for family, batches in by_family(tuned).items():
        grids = {
            batch: {name: (outcomes(one.runs), one.best) for name, one in group.items() if one.best}
            for batch, group in batches.items()
        }
        grids = {batch: grid for batch, grid in grids.items() if grid}
        if max((len({o.lr for o in found}) for grid in grids.values() for found, _ in grid.values()), default=0) < 2:
            continue
        lost = [
            f"{name} at batch {batch:,}" for batch in batches for name, one in batches[batch].items() if not one.best
        ]
        section.parts.append(
            Plot(
                f"sensitivity-{slug(family.title)}",
                f"{family.title}: final validation loss against the peak learning rate over each optimizer's best one, "
                "a panel for each batch; the table has the rates. Hollow: lacks some of the "
                "choice's seeds. Over the upper edge: crosses diverged, arrows lie above the axis."
                + (f" Not drawn, as no rate gave a loss: {'; '.join(lost)}." if lost else ""),
                partial(draw_sensitivity, grids),
            )
        )
        rows = [_grid_row(one, lr, links) for group in batches.values() for one in group.values() for lr in _lrs(one)]
        columns = ["batch", "optimizer", "lr", "seeds (loss)", ""]
        section.parts.append(Table(f"{family.title}: every learning rate", columns, rows, folded=True))
    return section if section.parts else None


def _lrs(one: Tuned) -> list[float]:
    return sorted({outcome.lr for outcome in outcomes(one.runs)})


def _grid_row(one: Tuned, lr: float, links: Links) -> list[Cell]:
    runs = sorted((run for run in one.runs if run.lr == lr and run.loss is not None), key=lambda run: run.seed)
    chosen = one.best is not None and one.best.lr == lr
    swatch = cell(one.optimizer, colour=look(one.optimizer)[0])
    return [
        cell(f"{one.batch:,}"),
        swatch,
        cell(f"{lr:g}", strong=chosen),
        seeds_cell(runs, links),
        cell("best" if chosen else ""),
    ]
