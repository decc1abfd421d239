# SPDX-License-Identifier: Apache-2.0
"""How the report's pictures look: one colour and mark for each optimizer, readable axes, labels that do not collide."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart, and four more that differ in lightness; the mark is a
# second sign. In the order in which optimizers are listed.
_LOOKS = {
    "adamw": ("#4d4d4d", "o"),
    "lamb": ("#0072b2", "s"),
    "maxlamb": ("#56b4e9", "D"),
    "merit": ("#d55e00", "*"),
    "meritw": ("#e69f00", "P"),
    "lars": ("#009e73", "v"),
    "lion": ("#cc79a7", "^"),
    "sophiag": ("#6a3d9a", "X"),
    "scion": ("#8c6d1f", "h"),
    "muon": ("#7a1f2b", "d"),
}
_FURTHER = (("#1b7837", "<"), ("#a6761d", ">"), ("#666699", "p"), ("#b35c8a", "H"), ("#3b3b98", "8"))
_OURS = {"meritlamb": "lamb", "meritmaxlamb": "maxlamb", "meritlars": "lars", "meritlion": "lion"} | {
    "meritsophiag": "sophiag",
    "meritscion": "scion",
}
GREY = "#6b7280"
_WIDTH = 10.4
"""Inches of a picture's full width."""


def look(name: str) -> tuple[str, str]:
    """Colour and mark of an optimizer, the same in every picture and report; a label that is not known takes one by its
    letters."""
    key = _key(name)
    if key in _LOOKS:
        return _LOOKS[key]
    return _FURTHER[sum(key.encode()) % len(_FURTHER)]


def ordered(names: Iterable[str]) -> list[str]:
    """Optimizers in the order of the paper, unknown ones behind them."""
    known = list(_LOOKS)
    return sorted(set(names), key=lambda name: (known.index(_key(name)) if _key(name) in known else len(known), name))


def _key(name: str) -> str:
    key = "".join(letter for letter in name.casefold() if letter.isalnum())
    return _OURS.get(key, key)


def panels(count: int, *, height: float = 3.3, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure with `count` axes, two or three in a row; the unused places stay empty."""
    pyplot = _pyplot()
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    width = _WIDTH if columns > 1 else 6.4
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(width, height * rows + 0.3), squeeze=False, sharey=share_y, layout="constrained"
    )
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    for used in axes[:count]:
        used.spines[["top", "right"]].set_visible(False)
        used.grid(color="#e3e7ec", linewidth=0.7)
        used.set_axisbelow(True)
    return figure, axes[:count]


def label_left(axes: Any, label: str) -> None:
    """Label the y axis of the panels at the left alone: the others say the same."""
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(label)


def to_png(figure: Any) -> bytes:
    """The figure as a PNG, without the date and versions in it: the same results give the same bytes."""
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    _pyplot().close(figure)
    return target.getvalue()


def legend(figure: Any, names: Sequence[str], *, extra: Sequence[Any] = ()) -> None:
    """One legend above all panels, by optimizer; in as many rows as the figure's width asks for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=look(n)[0], marker=look(n)[1], markersize=_size(n), label=n) for n in names]
    every = [*handles, *extra]
    for rows in range(1, len(every) + 1):
        columns = -(-len(every) // rows)
        made = figure.legend(handles=every, loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            break
        made.remove()


def style(name: str) -> dict[str, Any]:
    """Keyword arguments for a line with marks."""
    colour, mark = look(name)
    return {"color": colour, "marker": mark, "markersize": _size(name), "linewidth": 1.6}


def sparse(name: str, count: int) -> dict[str, Any]:
    """The style of a line of `count` points with about eight marks, the last point among them."""
    stride = max(1, count // 8)
    return style(name) | {"markevery": ((count - 1) % stride, stride), "linewidth": 1.4} if count else style(name)


def ink(name: str) -> str:
    """The optimizer's colour for text: darker where the colour itself is too pale to read on white."""
    colour = look(name)[0]
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    luminance = sum(weight * (part / 255) ** 2.2 for weight, part in zip((0.21, 0.72, 0.07), parts, strict=True))
    keep = min(1.0, (0.16 / luminance) ** (1 / 2.2))
    return "#" + "".join(f"{round(part * keep):02x}" for part in parts)


def whole_steps(axes: Any) -> None:
    """Name the x axis; a step has no half."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=(1, 2, 2.5, 5, 10)))


def number_axis(axis: Any, values: Sequence[float], *, limit: int = 6) -> None:
    """Make a logarithmic axis show plain numbers: at `values` where there are at most `limit`, else at 1, 2 and 5, at
    1 alone where they span more than three decades, and at more in between where these would be rare."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    distinct = sorted(set(values))
    if len(distinct) <= limit:
        axis.set_major_locator(FixedLocator(distinct))
    elif distinct[-1] > 1000 * distinct[0]:
        axis.set_major_locator(LogLocator(subs=(1,)))
    elif distinct[-1] > 5 * distinct[0]:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A number as people write it: 0.002, 12, 4,096."""
    if 1000 <= value < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def three_digits(value: float) -> str:
    """A positive number with three significant digits, zeros included: 3.00, 0.182, 245, 1,250."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def two_digits(value: float) -> str:
    """A number with two significant digits, or all those before the point: 0.0017, 3.1, 118."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def end_labels(axes: Any, points: Sequence[tuple[str, float, float, str]], *, fontsize: float = 8) -> None:
    """Texts to the right of the last point of each line, moved apart where they would overlap.

    Args:
        points: (text, x, y, colour), in data coordinates; the axes' limits must be final.
    """
    axes.figure.canvas.draw()
    to_pixels, height = axes.transData, fontsize * axes.figure.dpi / 72 * 1.2
    wanted = sorted(((to_pixels.transform((x, y))[1], text, x, y, colour) for text, x, y, colour in points))
    places = spread_apart([pixel for pixel, *_ in wanted], height)
    scale = 72 / axes.figure.dpi
    for place, (pixel, text, x, y, colour) in zip(places, wanted, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(13, (place - pixel) * scale),
            textcoords="offset points",
            color=colour,
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, near the wanted ascending ones: clusters are centred on their mean."""
    clusters: list[tuple[list[float], float]] = []
    for place in wanted:
        members, centre = [place], place
        while clusters and clusters[-1][1] + gap * (len(clusters[-1][0]) + len(members)) / 2 > centre:
            members = clusters.pop()[0] + members
            centre = sum(members) / len(members)
        clusters.append((members, centre))
    return [
        centre + gap * (index - (len(members) - 1) / 2) for members, centre in clusters for index in range(len(members))
    ]


def _size(name: str) -> float:
    return 9.0 if look(name)[1] == "*" else 5.5


_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#30363f",
    "xtick.color": "#30363f",
    "ytick.color": "#30363f",
    "legend.fontsize": 9,
    "savefig.dpi": 150,
    "figure.dpi": 150,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw within: pictures look like the report's, and matplotlib's settings are what they were afterwards."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
