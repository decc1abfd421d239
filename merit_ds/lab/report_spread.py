# SPDX-License-Identifier: Apache-2.0
"""Minimum, mean and maximum by kind of parameter, of a quantity that has them for each, such as trust ratios."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from merit_ds.lab.figures import look
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, cell
from merit_ds.lab.report_quantities import VECTOR, Quantity, sizes_of
from merit_ds.lab.report_runs import Run, number

KINDS = ("embeddings, output", "matrices of the layers", "norms, biases")
SPREAD_COLUMNS = ["batch", "optimizer", "run", *(f"{kind}: min / mean / max" for kind in KINDS)]


def spread_row(batch: int, name: str, run: Run, quantity: Quantity, links: Links) -> list[Cell]:
    """What the run's last sample says."""
    last = next(row for row in reversed(run.telemetry) if row.get(quantity.key))
    found = spreads(last[quantity.key], sizes_of(last, quantity))
    return [
        cell(f"{batch:,}"),
        cell(name, colour=look(name)[0]),
        cell(f"lr {run.lr:g} seed {run.seed}", links.run(run)),
        *(cell(" / ".join(f"{value:.3g}" for value in found[kind]) if kind in found else "-") for kind in KINDS),
    ]


def spreads(sample: dict[str, Any], sizes: dict[str, int] | None) -> dict[str, tuple[float, float, float]]:
    """Kind of parameter to the smallest, the mean and the largest of its elements.

    Args:
        sample: parameter to [minimum, mean, maximum]; one with a value that is not finite does not count.
        sizes: parameter to its number of elements; None: all count alike.
    """
    found: dict[str, list[tuple[Sequence[float], int]]] = {}
    for name, triple in sample.items():
        values = [value for part in triple if (value := number(part)) is not None and math.isfinite(value)]
        if len(values) == 3:
            found.setdefault(_kind(name), []).append((values, sizes[name] if sizes else 1))
    return {
        kind: (
            min(low for (low, _, _), _ in entries),
            fmean([mean for (_, mean, _), _ in entries], [weight for _, weight in entries]),
            max(high for (_, _, high), _ in entries),
        )
        for kind, entries in found.items()
    }


def _kind(name: str) -> str:
    if "embedding" in name or "output_layer" in name:
        return KINDS[0]
    return KINDS[2] if VECTOR.search(name) else KINDS[1]
