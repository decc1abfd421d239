# SPDX-License-Identifier: Apache-2.0
"""The report's section on the models of one study: what a change of the model does to each optimizer."""

from collections.abc import Mapping, Sequence
from functools import partial

from merit_ds.lab import figures_loss
from merit_ds.lab.figures import look, ordered
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, seeds_cell
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run, Study, count_text
from merit_ds.lab.report_statistics import Best, signed
from merit_ds.lab.study import slug

Models = dict[str, tuple[Best, Sequence[Run]]]
"""Model to what an optimizer came to with it, and the runs that say so; the study's first model first."""


def models_section(studies: Sequence[Study], tuned: Sequence[Tuned], links: Links) -> Section | None:
    """Each optimizer's best loss with each model of a study, where a study has several on one token budget."""
    section = Section("Models side by side", "models")
    section.text.append(
        "What a change of the model does to each optimizer, on the same corpus and token budget: the final validation "
        "loss at each one's best learning rate with either model, or at that of the first where the study says so "
        "(`lr_of`)."
    )
    for study in studies:
        for tokens, batches in _by_budget(study, tuned).items():
            where = study.name if tokens is None else f"{study.name}, {count_text(tokens)} tokens"
            section.parts.append(_plot(where, batches))
            section.parts.append(_table(where, batches, links))
    return section if section.parts else None


def _by_budget(study: Study, tuned: Sequence[Tuned]) -> dict[int | None, dict[int, dict[str, Models]]]:
    """Tokens to batch to optimizer to model; without optimizers that have one model only."""
    found: dict[int | None, dict[int, dict[str, Models]]] = {}
    for label in study.models:
        for one in tuned:
            if one.best and one.runs[0].study == study.name and one.runs[0].model == label:
                batches = found.setdefault(one.family.tokens, {})
                batches.setdefault(one.batch, {}).setdefault(one.optimizer, {})[label] = (one.best, one.at_best)
    kept: dict[int | None, dict[int, dict[str, Models]]] = {}
    for tokens, batches in found.items():
        for batch, group in sorted(batches.items()):
            pairs = {name: models for name, models in group.items() if len(models) > 1}
            if pairs:
                kept.setdefault(tokens, {})[batch] = pairs
    return kept


def _plot(where: str, batches: Mapping[int, Mapping[str, Models]]) -> Plot:
    bests = {
        batch: {name: {label: best for label, (best, _) in models.items()} for name, models in group.items()}
        for batch, group in batches.items()
    }
    return Plot(
        f"models-{slug(where)}",
        f"{where}: final validation loss of each optimizer with each model; mark: mean over seeds, bar: their range. "
        "With QK-Norm beside the paper's figure 8.",
        partial(figures_loss.draw_models, bests),
    )


def _table(where: str, batches: Mapping[int, Mapping[str, Models]], links: Links) -> Table:
    rows: list[list[Cell]] = []
    for batch, group in batches.items():
        for name in ordered(group):
            (first, _), *_ = group[name].values()
            for label, (best, runs) in group[name].items():
                mean = best.summary.mean
                rows.append(
                    [
                        cell(f"{batch:,}"),
                        cell(name, colour=look(name)[0]),
                        cell(label),
                        cell(f"{best.lr:g}"),
                        cell(f"{mean:.3f}"),
                        cell("-" if best is first else signed(mean - first.summary.mean)),
                        seeds_cell(runs, links),
                    ]
                )
    columns = ["batch", "optimizer", "model", "lr", "mean loss", "to the first model", "seeds (loss)"]
    return Table(f"{where}: the models side by side", columns, rows)
