# SPDX-License-Identifier: Apache-2.0
"""The report's sections on telemetry: attention, clipping, the whole-weight bound, the gap of the norms."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from merit_ds.lab import figures_telemetry
from merit_ds.lab.figures import look, ordered
from merit_ds.lab.figures_telemetry import LayerMap
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run, number
from merit_ds.lab.study import slug

_LAYER = re.compile(r"layers?\.(\d+)\.")
_VECTOR = re.compile(r"norm|bias")


@dataclass(frozen=True)
class Quantity:
    """Something that telemetry samples for every layer."""

    key: str
    title: str
    label: str
    text: str
    beside: str = ""
    """Figures of the paper that show the same."""
    share: bool = False
    """A share of a parameter's elements, so that parameters count by their sizes."""
    trivial: float | None = None
    """The value that an optimizer without the mechanism has throughout; such a run is not drawn."""
    logarithmic: bool = False


QUANTITIES = (
    Quantity(
        key="max_attention_logit",
        title="Attention logits",
        label="max attention logit",
        text="The largest entry of QK^T/sqrt(d) of each layer, before the softmax. Where it runs away, attention "
        "saturates on single tokens.",
        beside="the paper's figures 2 and 14",
        logarithmic=True,
    ),
    Quantity(
        key="attention_entropy",
        title="Attention entropy",
        label="attention entropy (nats)",
        text="Mean entropy of the attention weights of a query: low means that it looks at few tokens.",
    ),
    Quantity(
        key="clipped_share",
        title="Clipped elements",
        label="clipped elements",
        text="Share of elements whose scaled update lies at the clip bound, over all elements of a layer.",
        beside="the paper's figure 13",
        share=True,
        trivial=0.0,
    ),
    Quantity(
        key="whole_share",
        title="Whole-weight bound",
        label="at the whole-weight bound",
        text="Share of elements whose trust ratio is the whole weight's, over all elements of a layer's matrices.",
        beside="the paper's figure 15",
        share=True,
        trivial=1.0,
    ),
    Quantity(
        key="l2_max_gap",
        title="Gap between l2 and max norm",
        label="(l2 - max) / l2",
        text="How far the l2 norm lies above the max norm, as a share of it; the mean of a layer's W_Q and W_K.",
        beside="the paper's figure 10",
    ),
    Quantity(
        key="row_similarity",
        title="Similarity within rows",
        label="similarity within rows",
        text="How alike the sizes of the elements of a row are, against those of other rows; the plain mean over a "
        "layer's matrices.",
        beside="the paper's figure 3",
    ),
    Quantity(
        key="col_similarity",
        title="Similarity within columns",
        label="similarity within columns",
        text="How alike the sizes of the elements of a column are, against those of other columns; the plain mean over "
        "a layer's matrices.",
        beside="the paper's figure 3",
    ),
)


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
    section.text.append("One run of each optimizer, at its best learning rate, on one colour scale.")
    for family, batches in by_family(tuned).items():
        rows, shown = [], {}
        for batch, group in batches.items():
            runs = {name: run for name, one in group.items() if (run := _sampled(one, quantity))}
            drawn = {name: run for name, run in runs.items() if not is_trivial(run.telemetry, quantity)}
            maps = {name: layer_map(run, quantity) for name, run in drawn.items()}
            if maps:
                shown[batch] = maps
                name = f"{slug(quantity.key)}-{slug(family.title)}-batch-{batch}"
                section.parts.append(_map_plot(quantity, name, f"{family.title}, batch {batch:,}", maps))
                rows += [_row(batch, name, one, runs[name], quantity, links) for name, one in maps.items()]
        if quantity.key == "max_attention_logit" and shown:
            section.parts.insert(len(section.parts) - len(shown), _peak_plot(quantity, family.title, shown))
        if rows:
            columns = ["batch", "optimizer", "run", "lowest", "highest", "layers at the end"]
            section.parts.append(Table(f"{family.title}: {quantity.label}", columns, rows, folded=True))
        _tell_gaps(section, family.title, batches, quantity)
    return section if section.parts or len(section.text) > 2 else None


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
            elif quantity.share and not all(_sizes(row, quantity) for row in run.telemetry if row.get(quantity.key)):
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


def is_trivial(rows: Sequence[dict[str, Any]], quantity: Quantity) -> bool:
    """Whether every parameter's every sample has the value that says that the optimizer lacks what is measured."""
    samples = [row[quantity.key] for row in rows if row.get(quantity.key)]
    return quantity.trivial is not None and all(v == quantity.trivial for by in samples for v in by.values())


def _sizes(row: dict[str, Any], quantity: Quantity) -> dict[str, int] | None:
    """Numbers of elements of the parameters that the row samples; None if it does not tell those of all."""
    sizes = row.get("elements") or {}
    return sizes if row[quantity.key].keys() <= sizes.keys() else None


def _map_plot(quantity: Quantity, name: str, where: str, maps: dict[str, LayerMap]) -> Plot:
    draw = partial(
        figures_telemetry.draw_maps,
        maps,
        label=quantity.label,
        percent=quantity.share,
        logarithmic=quantity.logarithmic,
    )
    caption = f"{where}: {quantity.label} by layer and step, a panel for each optimizer."
    caption += f" Beside {quantity.beside}." if quantity.beside else ""
    return Plot(name, caption, draw)


def _peak_plot(quantity: Quantity, where: str, peaks: dict[int, dict[str, LayerMap]]) -> Plot:
    draw = partial(figures_telemetry.draw_peaks, peaks, label=quantity.label)
    caption = f"{where}: {quantity.label}, the largest of all layers, against steps; the last value at the line's end."
    return Plot(f"{slug(quantity.key)}-peaks-{slug(where)}", caption, draw)


def _sampled(one: Tuned, quantity: Quantity) -> Run | None:
    """The run that stands for the optimizer, or another seed's at the same learning rate that has the samples."""
    candidates = ([one.shown] if one.shown else []) + one.at_best
    return next((run for run in candidates if layer_map(run, quantity).steps), None)


def layer_map(run: Run, quantity: Quantity) -> LayerMap:
    """The quantity by layer and step; without steps if it was not sampled."""
    steps, values = [], []
    for row in run.telemetry:
        sample = row.get(quantity.key)
        sample = share_by_layer(sample, _sizes(row, quantity)) if quantity.share and sample else by_layer(sample)
        if sample:
            steps.append(int(row["iteration"]))
            values.append(sample)
    return LayerMap(steps, values, note=f"lr {run.lr:g}")


def by_layer(sample: Any) -> list[float]:
    """One value a layer: as sampled, or the plain mean over each layer's parameters where it is by parameter.

    Args:
        sample: a list by layer, or parameter name to value; parameters outside the layers are left out.
    """
    if isinstance(sample, list):
        return [_finite(value) for value in sample]
    return _means(sample, dict.fromkeys(sample, 1)) if isinstance(sample, dict) else []


def share_by_layer(sample: dict[str, Any], sizes: dict[str, int] | None) -> list[float]:
    """The share of each layer's elements, from the shares of its parameters.

    Args:
        sizes: parameter to its number of elements; None: they are not known, and the plain mean over the matrices is
            taken, since a norm's few elements would count like a matrix.
    """
    if sizes is not None:
        return _means(sample, sizes)
    return by_layer({name: share for name, share in sample.items() if not _VECTOR.search(name)})


def _means(sample: dict[str, Any], weights: dict[str, int]) -> list[float]:
    found: dict[int, list[tuple[float, int]]] = {}
    for name, value in sample.items():
        if match := _LAYER.search(name):
            found.setdefault(int(match.group(1)), []).append((_finite(value), weights[name]))
    finite = {layer: [pair for pair in pairs if math.isfinite(pair[0])] for layer, pairs in found.items()}
    layers = range(max(found, default=-1) + 1)
    return [fmean(*zip(*finite[layer], strict=True)) if finite.get(layer) else math.nan for layer in layers]


def _finite(value: object) -> float:
    converted = number(value)
    return math.nan if converted is None else converted


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
