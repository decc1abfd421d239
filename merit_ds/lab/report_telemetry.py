# SPDX-License-Identifier: Apache-2.0
"""The report's sections on telemetry: attention, clipping, the whole-weight bound, the gap of the norms."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from merit_ds.lab import figures_telemetry
from merit_ds.lab.figures import look, ordered
from merit_ds.lab.figures_telemetry import LayerMap
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_peaks import peak_parts
from merit_ds.lab.report_quantities import QUANTITIES, Quantity, is_trivial, layer_map, sizes_of
from merit_ds.lab.report_runs import Run
from merit_ds.lab.report_spread import SPREAD_COLUMNS, spread_row
from merit_ds.lab.study import slug


def telemetry_sections(tuned: Sequence[Tuned], links: Links) -> list[Section]:
    """A section for each quantity that any run at its best learning rate sampled."""
    made = [_section(quantity, tuned, links) for quantity in QUANTITIES]
    sections = [section for section in made if section is not None]
    if not sections:
        text = "No run at its optimizer's best learning rate has telemetry, so nothing is said of attention and ratios."
        return [Section("Telemetry", "telemetry", text=[text])]
    return sections


def _section(quantity: Quantity, tuned: Sequence[Tuned], links: Links) -> Section | None:
    section = Section(quantity.title, quantity.key.replace("_", "-"), text=[quantity.text])
    if quantity.layered:
        section.text.append(
            "The maps: one run of each optimizer, at its best learning rate, on one colour scale. An arrow at its end: "
            "some values lie beyond and have that end's colour; the table has the extremes."
        )
    lead = len(section.text)
    for family, batches in by_family(tuned).items():
        if quantity.peaks:
            section.parts += peak_parts(quantity, family.title, batches, links)
        if quantity.layered:
            section.parts += _map_parts(quantity, family.title, batches, links)
        _tell_gaps(section, family.title, batches, quantity)
    return section if section.parts or len(section.text) > lead else None


def _map_parts(
    quantity: Quantity, title: str, batches: dict[int, dict[str, Tuned]], links: Links
) -> list[Table | Plot]:
    """A map for each batch, and the tables of one family."""
    parts: list[Table | Plot] = []
    rows, spreads = [], []
    for batch, group in batches.items():
        runs = {name: run for name, one in group.items() if (run := _sampled(one, quantity))}
        drawn = {name: run for name, run in runs.items() if not is_trivial(run.telemetry, quantity)}
        maps = {name: layer_map(run, quantity) for name, run in drawn.items()}
        if maps:
            name = f"{slug(quantity.key)}-{slug(title)}-batch-{batch}"
            parts.append(_map_plot(quantity, name, f"{title}, batch {batch:,}", maps))
            rows += [_row(batch, name, one, runs[name], quantity, links) for name, one in maps.items()]
            spreads += [spread_row(batch, name, runs[name], quantity, links) for name in maps if quantity.spread]
    if spreads:
        parts.append(Table(f"{title}: {quantity.label} at the last sample", SPREAD_COLUMNS, spreads))
    if rows:
        columns = ["batch", "optimizer", "run", "lowest", "highest", "layers at the end"]
        parts.append(Table(f"{title}: {quantity.label}", columns, rows, folded=True))
    return parts


def _tell_gaps(section: Section, where: str, batches: dict[int, dict[str, Tuned]], quantity: Quantity) -> None:
    """Say which runs are not drawn, and which are drawn without their parameters' sizes."""
    missing, trivial, unsized = (dict[str, list[str]]() for _ in range(3))
    for batch, group in batches.items():
        for name, one in group.items():
            run = _sampled(one, quantity)
            if run is None:
                missing.setdefault(name, []).append(f"{batch:,}")
            elif is_trivial(run.telemetry, quantity):
                trivial.setdefault(name, []).append(f"{batch:,}")
            elif quantity.sized and not all(sizes_of(row, quantity) for row in run.telemetry if row.get(quantity.key)):
                unsized.setdefault(name, []).append(f"{batch:,}")
    if trivial:
        section.text.append(f"{where}: {quantity.trivial:.0%} throughout, so not drawn: {_where(trivial)}.")
    if missing and (trivial or section.parts):
        section.text.append(f"{where}: no samples of {_where(missing)}.")
    if unsized:
        section.warnings.append(
            f"{where}: the telemetry of {_where(unsized)} does not tell the parameters' sizes: the plain mean over a "
            "layer's matrices is shown, without norms and biases."
        )


def _where(batches: dict[str, list[str]]) -> str:
    return "; ".join(f"{name} at batch {', '.join(batches[name])}" for name in ordered(batches))


def _map_plot(quantity: Quantity, name: str, where: str, maps: dict[str, LayerMap]) -> Plot:
    draw = partial(
        figures_telemetry.draw_maps,
        maps,
        label=quantity.label,
        percent=quantity.share,
        logarithmic=quantity.logarithmic,
        floor=quantity.floor,
    )
    caption = f"{where}: {quantity.label} by layer and step, a panel for each optimizer."
    caption += f" Beside {quantity.beside}." if quantity.beside else ""
    return Plot(name, caption, draw)


def _sampled(one: Tuned, quantity: Quantity) -> Run | None:
    """The run that stands for the optimizer, or another seed's at the same learning rate that has the samples."""
    candidates = ([one.shown] if one.shown else []) + one.at_best
    return next((run for run in candidates if layer_map(run, quantity).steps), None)


def _row(batch: int, name: str, one: LayerMap, run: Run, quantity: Quantity, links: Links) -> list[Cell]:
    text: Callable[[float], str] = (lambda value: f"{value:.2%}") if quantity.share else (lambda value: f"{value:.4g}")
    entries = [
        (value, step, layer)
        for step, sample in zip(one.steps, one.values, strict=True)
        for layer, value in enumerate(sample)
        if math.isfinite(value)
    ]
    cells = [
        cell(f"{batch:,}"),
        cell(name, colour=look(name)[0]),
        cell(f"lr {run.lr:g} seed {run.seed}", links.run(run)),
    ]
    if not entries:
        return [*cells, *(cell("not finite") for _ in range(3))]
    extremes = [min(entries), max(entries)]
    last = [value for value, step, _ in entries if step == one.steps[-1]]
    end = f"{text(min(last))} to {text(max(last))}" if last else "not finite"
    found = [f"{text(value)} (layer {layer}, step {step:,})" for value, step, layer in extremes]
    return cells + [cell(entry) for entry in (*found, end)]
