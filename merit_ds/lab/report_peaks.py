# SPDX-License-Identifier: Apache-2.0
"""Of a quantity the largest value of all layers against steps: every seed at the best learning rate."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from merit_ds.lab.figures import look
from merit_ds.lab.figures_telemetry import Line, draw_peaks
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_loss import Tuned
from merit_ds.lab.report_page import Cell, Plot, Table, cell
from merit_ds.lab.report_quantities import Quantity, layer_map
from merit_ds.lab.report_runs import Run
from merit_ds.lab.study import slug

Peaks = Sequence[tuple[Run, Line]]
"""Each seed's run with its samples."""


def peak_parts(
    quantity: Quantity, title: str, batches: Mapping[int, Mapping[str, Tuned]], links: Links
) -> list[Plot | Table]:
    """The picture and the table of one family; nothing where no run was sampled."""
    found = {batch: {name: _peaks(one, quantity) for name, one in group.items()} for batch, group in batches.items()}
    found = {batch: {name: peaks for name, peaks in group.items() if peaks} for batch, group in found.items()}
    found = {batch: group for batch, group in found.items() if group}
    if not found:
        return []
    lines = {batch: {name: [line for _, line in p] for name, p in group.items()} for batch, group in found.items()}
    what = f"{title}: {quantity.label}" + (", the largest of all layers" if quantity.layered else "")
    caption = f"{what}, against steps; mean over seeds with its last value, band: their range."
    if quantity.floor is not None:
        caption += f" No axis reaches below {quantity.floor:g}: what ends there has a ↓."
    if quantity.partial:
        caption += _micro_batches({b: [run for p in group.values() for run, _ in p] for b, group in found.items()})
    draw = partial(draw_peaks, lines, label=quantity.label, floor=quantity.floor)
    columns = [
        "batch",
        "optimizer",
        "lr",
        "at the end, by seed",
        "min to max",
        "largest of the run, by seed",
        "min to max",
    ]
    rows = [_row(batch, name, peaks, links) for batch, group in found.items() for name, peaks in group.items()]
    return [Plot(f"{slug(quantity.key)}-peaks-{slug(title)}", caption, draw), Table(f"{what}, by seed", columns, rows)]


def _micro_batches(runs: Mapping[int, Sequence[Run]]) -> str:
    """Where the runs were looked at, and in how many sequences, if that is known of all of them."""
    sizes = {batch: {_micro_batch(run) for run in found} for batch, found in runs.items()}
    known = [
        f"{' or '.join(f'{size:,}' for size in sorted(filter(None, found)))} sequences at batch {batch:,}"
        for batch, found in sizes.items()
        if None not in found
    ]
    return " In each rank's first micro-batch" + (f": {', '.join(known)}." if len(known) == len(sizes) else ".")


def _micro_batch(run: Run) -> int | None:
    """Sequences of a rank's micro-batch."""
    with suppress(ValueError, TypeError, AttributeError):
        size = json.loads(run.text("deepspeed.json") or "{}").get("train_micro_batch_size_per_gpu")
        return None if size is None else int(size)
    return None


def _peaks(one: Tuned, quantity: Quantity) -> Peaks:
    sampled = [(run, layer_map(run, quantity)) for run in one.at_best]
    return [
        (run, list(zip(found.steps, map(_largest, found.values), strict=True))) for run, found in sampled if found.steps
    ]


def _largest(sample: Sequence[float]) -> float:
    return max((value for value in sample if math.isfinite(value)), default=math.nan)


def _row(batch: int, name: str, peaks: Peaks, links: Links) -> list[Cell]:
    ends = [(run, line[-1][1]) for run, line in peaks]
    largest = [(run, _largest([value for _, value in line])) for run, line in peaks]
    first, _ = peaks[0]
    return [
        cell(f"{batch:,}"),
        cell(name, colour=look(name)[0]),
        cell(f"{first.lr:g}"),
        *_by_seed(ends, links),
        *_by_seed(largest, links),
    ]


def _by_seed(values: Sequence[tuple[Run, float]], links: Links) -> tuple[Cell, Cell]:
    """Each seed's value, linked to its run, and their range."""
    parts: list[tuple[str, str | None]] = []
    for run, value in values:
        text = f"{value:.3g}" if math.isfinite(value) else "not finite"
        parts += [(", " if parts else "", None), (f"{run.seed}: {text}", links.run(run))]
    finite = [value for _, value in values if math.isfinite(value)]
    return Cell(tuple(parts)), cell(f"{min(finite):.3g} to {max(finite):.3g}" if len(finite) > 1 else "-")
