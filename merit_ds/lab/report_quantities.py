# SPDX-License-Identifier: Apache-2.0
"""What telemetry samples, as the report shows it: by layer and step, from the rows of telemetry.jsonl."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from merit_ds.lab.figures_telemetry import LayerMap
from merit_ds.lab.report_runs import Run, number

_LAYER = re.compile(r"layers?\.(\d+)\.")
VECTOR = re.compile(r"norm|bias")


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
    """A share of a parameter's elements, shown in per cent."""
    sized: bool = False
    """Whether a layer's parameters count by their sizes."""
    spread: bool = False
    """Whether a parameter's sample is its [minimum, mean, maximum]; maps show the mean."""
    layered: bool = True
    """Whether it is sampled by layer; else it is one number, and has no map."""
    trivial: float | None = None
    """The value that an optimizer without the mechanism has throughout; such a run is not drawn."""
    logarithmic: bool = False
    peaks: bool = False
    """Whether the largest value of all layers is shown for every seed too."""
    partial: bool = False
    """Whether it is seen in each rank's first micro-batch alone, so that the micro-batch's size matters."""
    floor: float | None = None
    """No axis or colour scale reaches below it, so that one optimizer's tiny values do not flatten all others."""


QUANTITIES = (
    Quantity(
        key="max_attention_logit",
        title="Attention logits",
        label="max attention logit",
        text="The largest entry of QK^T/sqrt(d) of each layer, before the softmax, in every rank's first micro-batch "
        "of the sampled step: the more sequences that has, the larger it tends to be. Where it runs away, attention "
        "saturates on single tokens.",
        beside="the paper's figures 2 and 14",
        logarithmic=True,
        peaks=True,
        partial=True,
        floor=1.0,
    ),
    Quantity(
        key="attention_entropy",
        title="Attention entropy",
        label="attention entropy (nats)",
        text="Mean entropy of the attention weights of a query, in every rank's first micro-batch of the sampled step: "
        "low means that it looks at few tokens.",
    ),
    Quantity(
        key="ratios",
        title="Trust ratios",
        label="trust ratio",
        text="What an element's update is scaled by, before the clip. The maps show the mean over all elements of a "
        "layer; the tables the smallest, the mean and the largest at the last sample, by kind of parameter.",
        sized=True,
        spread=True,
        logarithmic=True,
    ),
    Quantity(
        key="clipped_share",
        title="Clipped elements",
        label="clipped elements",
        text="Share of elements whose scaled update lies at the clip bound, over all elements of a layer.",
        beside="the paper's figure 13",
        share=True,
        sized=True,
        trivial=0.0,
    ),
    Quantity(
        key="whole_share",
        title="Whole-weight bound",
        label="at the whole-weight bound",
        text="Share of elements whose trust ratio is the whole weight's, over all elements of a layer's matrices.",
        beside="the paper's figure 15",
        share=True,
        sized=True,
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
    Quantity(
        key="output_operator_norm",
        title="Operator norm of the output layer",
        label="output layer's norm",
        text="The operator norm from RMS to infinity: the largest logit of the vocabulary that an input can get whose "
        "root mean square is 1.",
        layered=False,
        peaks=True,
    ),
)


def layer_map(run: Run, quantity: Quantity) -> LayerMap:
    """The quantity by layer and step; without steps if it was not sampled."""
    steps, values = [], []
    for row in run.telemetry:
        sample = row.get(quantity.key)
        if quantity.spread and sample:
            sample = {name: mean for name, (_, mean, _) in sample.items()}
        sample = share_by_layer(sample, sizes_of(row, quantity)) if quantity.sized and sample else by_layer(sample)
        if sample:
            steps.append(int(row["iteration"]))
            values.append(sample)
    return LayerMap(steps, values, note=f"lr {run.lr:g}, seed {run.seed}")


def by_layer(sample: Any) -> list[float]:
    """One value a layer: as sampled, or the plain mean over each layer's parameters where it is by parameter.

    Args:
        sample: a list by layer; or parameter name to value, where parameters outside the layers are left out; or one
            number, which stands for a single layer.
    """
    if isinstance(sample, dict):
        return _means(sample, dict.fromkeys(sample, 1))
    if sample is None:
        return []
    return [_finite(value) for value in (sample if isinstance(sample, list) else [sample])]


def share_by_layer(sample: dict[str, Any], sizes: dict[str, int] | None) -> list[float]:
    """The share, or mean, of each layer's elements, from those of its parameters.

    Args:
        sizes: parameter to its number of elements; None: they are not known, and the plain mean over the matrices is
            taken, since a norm's few elements would count like a matrix.
    """
    if sizes is not None:
        return _means(sample, sizes)
    return by_layer({name: share for name, share in sample.items() if not VECTOR.search(name)})


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


def is_trivial(rows: Sequence[dict[str, Any]], quantity: Quantity) -> bool:
    """Whether every parameter's every sample has the value that says that the optimizer lacks what is measured."""
    samples = [row[quantity.key] for row in rows if row.get(quantity.key)]
    return quantity.trivial is not None and all(v == quantity.trivial for by in samples for v in by.values())


def sizes_of(row: dict[str, Any], quantity: Quantity) -> dict[str, int] | None:
    """Numbers of elements of the parameters that the row samples; None if it does not tell those of all."""
    sizes = row.get("elements") or {}
    return sizes if row[quantity.key].keys() <= sizes.keys() else None
