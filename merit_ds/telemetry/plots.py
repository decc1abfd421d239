# SPDX-License-Identifier: Apache-2.0
"""Pictures of telemetry.jsonl: by layer and step, and by kind of weight.

`draw_attention_map` and `draw_layers` fill axes, so that several runs can stand side by side; `draw_weights` fills a
figure with a panel for each kind of weight. `save_plots` makes a PNG of everything that the rows hold.
"""

import re
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure

Row = dict[str, Any]

LABELS = {
    "max_attention_logit": "largest attention logit",
    "attention_entropy": "attention entropy (nats)",
    "ratios": "trust ratio: mean, and range",
    "clipped_share": "share of clipped elements",
    "whole_share": "share where the whole weight's ratio decides",
    "l2_max_gap": "(l2 norm - max norm) / l2 norm",
    "row_similarity": "correlation of |w| within rows",
    "col_similarity": "correlation of |w| within columns",
    "output_operator_norm": "RMS to infinity norm of the output layer",
}
_IN_LEGEND = 8
"""Layers that a legend has room for; more get a colour bar."""
_OUTSIDE = "outside the layers"


def draw_attention_map(rows: list[Row], axes: Axes, *, title: str, largest: float | None = None) -> None:
    """The largest attention logit by layer and step, as figures 2 and 14 of arXiv 2508.20577 show it.

    Args:
        rows: of telemetry.jsonl; those without the value are left out. There must be one with it.
        largest: the end of the colour scale, for maps that are to be compared; None: the largest logit.
    """
    rows = [row for row in rows if "max_attention_logit" in row]
    columns = [row["max_attention_logit"] for row in rows]
    mesh = axes.pcolormesh(
        [row["iteration"] for row in rows],
        range(len(columns[0])),
        [list(layer) for layer in zip(*columns, strict=True)],
        shading="nearest",
        cmap="magma",
        vmin=0,
        vmax=max(map(max, columns)) if largest is None else largest,
    )
    axes.figure.colorbar(mesh, ax=axes, label=LABELS["max_attention_logit"])
    axes.set(xlabel="optimizer step", ylabel="layer", title=title)
    axes.set_yticks(_ticks(len(columns[0])))


def draw_layers(rows: list[Row], axes: Axes, *, value: str, title: str) -> None:
    """A value of every layer, such as `attention_entropy`, or of the whole model, against steps.

    Args:
        rows: of telemetry.jsonl; those without the value are left out. There must be one with it.
        value: whose content is a list with a number for each layer, or a single number.
    """
    rows = [row for row in rows if value in row]
    steps = [row["iteration"] for row in rows]
    contents = [row[value] if isinstance(row[value], list) else [row[value]] for row in rows]
    for layer, numbers in enumerate(zip(*contents, strict=True)):
        axes.plot(steps, numbers, color=_colours(len(contents[0]))(layer), label=f"layer {layer}", **_style(steps))
    _finish(axes, ylabel=LABELS[value], title=title)
    if len(contents[0]) > _IN_LEGEND:
        _add_layer_bar(axes.figure, [axes], len(contents[0]))
    elif len(contents[0]) > 1:
        axes.legend(fontsize=9)


def draw_weights(rows: list[Row], figure: Figure, *, value: str, title: str) -> None:
    """A value of every weight against steps: a panel for each kind of weight, in it a line for each layer.

    Weights outside the layers, embeddings and the last norm, share one panel.

    Args:
        rows: of telemetry.jsonl; those without the value are left out. There must be one with it.
        figure: an empty one, of any size; see `weights_size`.
        value: whose content is numbers by name of the weight; `ratios` has three, shown as a line in a band, on a
            logarithmic scale.
    """
    rows = [row for row in rows if value in row]
    kinds = _kinds(rows, value)
    layers = 1 + max((layer for kind in kinds.values() for layer in kind if isinstance(layer, int)), default=-1)
    across, down = _grid(len(kinds))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (kind, names) in zip(panels, kinds.items(), strict=False):
        for number, (layer, name) in enumerate(names.items()):
            colour = _colours(layers)(layer) if isinstance(layer, int) else f"C{number}"
            points = [(row["iteration"], row[value][name]) for row in rows if name in row[value]]
            _draw_weight(panel, points, colour=colour, label=_short(name))
        _finish(panel, ylabel="", title=kind)
        if kind == _OUTSIDE:
            panel.legend(fontsize=8)
    for panel in panels[len(kinds) :]:
        panel.remove()
    for panel in panels[: len(kinds)][-across:]:  # nothing is left below them
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("optimizer step")
    if value == "ratios":
        panels[0].set_yscale("log")
    figure.suptitle(title)
    figure.supylabel(LABELS[value])
    if layers:
        _add_layer_bar(figure, list(panels[: len(kinds)]), layers)


def weights_size(rows: list[Row], *, value: str) -> tuple[float, float]:
    """Inches that fit `draw_weights`."""
    across, down = _grid(len(_kinds([row for row in rows if value in row], value)))
    return 1.6 + 3.2 * across, 0.9 + 2.5 * down


def save_plots(rows: list[Row], folder: Path, *, title: str) -> list[Path]:
    """A PNG of each value that the rows hold, and of the attention's map; returns where they lie.

    Args:
        rows: of telemetry.jsonl.
        folder: made if it is missing.
        title: of the run, stands above each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = []

    def save(figure: Figure, name: str) -> None:
        saved.append(folder / f"{name}.png")
        figure.savefig(saved[-1], dpi=130)

    for value in LABELS:
        found = [row[value] for row in rows if row.get(value)]
        if not found:
            continue
        if isinstance(found[0], dict):
            figure = Figure(figsize=weights_size(rows, value=value), layout="constrained")
            draw_weights(rows, figure, value=value, title=title)
        else:
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw_layers(rows, figure.subplots(), value=value, title=title)
        save(figure, value)
        if value == "max_attention_logit":
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw_attention_map(rows, figure.subplots(), title=title)
            save(figure, "attention_map")
    return saved


def _kinds(rows: list[Row], value: str) -> dict[str, dict[int | str, str]]:
    """Kind of weight to its layers, and those to the weight's name; those outside the layers come last."""
    kinds: dict[str, dict[int | str, str]] = {}
    others: dict[int | str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row[value]):
        inside = re.search(r"\blayers\.(\d+)\.(.+)", name)
        if inside:
            kinds.setdefault(_short(inside[2]), {})[int(inside[1])] = name
        else:
            others[name] = name
    return kinds | ({_OUTSIDE: others} if others else {})


def _draw_weight(axes: Axes, points: list[tuple[int, Any]], *, colour: Any, label: str) -> None:
    steps = [step for step, _ in points]
    middle = [number[1] if isinstance(number, list) else number for _, number in points]
    if isinstance(points[0][1], list):
        low, high = ([number[end] for _, number in points] for end in (0, 2))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(steps, middle, color=colour, label=label, **_style(steps))


def _style(steps: list[int]) -> dict[str, Any]:
    """One sample alone would be a line without length."""
    return {"linewidth": 1.3, "marker": "o" if len(steps) == 1 else None, "markersize": 4}


def _finish(axes: Axes, *, ylabel: str, title: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.set_title(title, fontsize=10 if not ylabel else 12)
    axes.grid(alpha=0.3)
    axes.label_outer()


def _add_layer_bar(figure: Figure | SubFigure, axes: list[Axes], layers: int) -> None:
    scale = ScalarMappable(Normalize(-0.5, layers - 0.5), _colours(layers))
    figure.colorbar(scale, ax=axes, label="layer", ticks=_ticks(layers), shrink=0.8)


def _colours(layers: int) -> ListedColormap:
    """A colour for each layer, from dark to light; the lightest ones would not be seen on white."""
    return ListedColormap([colormaps["viridis"](0.9 * index / max(layers - 1, 1)) for index in range(layers)])


def _ticks(layers: int) -> range:
    return range(0, layers, max(1, layers // 12))


def _grid(panels: int) -> tuple[int, int]:
    across = min(panels, 3 if panels <= 6 else 4)
    return across, -(-panels // across)


def _short(name: str) -> str:
    return re.sub(r"^(self_attention|embedding|decoder)\.|\.weight\b", "", name)
