# SPDX-License-Identifier: Apache-2.0
"""Step time against GPUs, and where the global batch stops scaling: each rank needs a micro-batch of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.plan.forecast import Estimate, Forecast, Paper, estimate
from merit_ds.plan.timing import Assumptions, Cluster
from merit_ds.plan.words import in_seconds, plural
from merit_ds.training.plan import Plan, plan_of

MOST_GPUS = 4096


@dataclass(frozen=True)
class Point:
    """One number of GPUs, with the recipe's micro-batch or a smaller one."""

    gpus: int
    estimate: Estimate


def curve(paper: Paper, ds_config: dict[str, Any], cluster: Cluster, assumed: Assumptions) -> list[Point]:
    """All of `gpu_counts` over which the batch can be spread, at the recipe's micro-batch and at each half of the last.

    Raises:
        InputError: the batch cannot be spread over `cluster` itself.
    """
    plan = plan_of(paper.config, ds_config, world=cluster.gpus)
    micro_batch = plan.batch.micro_batch
    points = []
    while micro_batch:
        changed = ds_config | {"train_micro_batch_size_per_gpu": micro_batch}
        for gpus in gpu_counts(cluster, most=2 * _limit(plan, micro_batch=1)):
            try:
                plan_of(paper.config, changed, world=gpus)
            except InputError:
                continue
            part = replace(cluster, nodes=gpus // cluster.gpus_per_node)
            points.append(Point(gpus, estimate(paper, ds_config, part, assumed, micro_batch=micro_batch)))
        micro_batch //= 2
    return points


def gpu_counts(cluster: Cluster, *, most: int) -> list[int]:
    """One node and its doublings, the cluster's halves and doublings in whole nodes, up to `most` GPUs and `MOST_GPUS`;
    and the cluster itself, whatever it has."""
    counts = {cluster.gpus}
    odd = cluster.nodes // (cluster.nodes & -cluster.nodes)
    for nodes in (1, odd):
        gpus = nodes * cluster.gpus_per_node
        while gpus <= min(most, MOST_GPUS):
            counts.add(gpus)
            gpus *= 2
    return sorted(counts)


def draw(points: Sequence[Point], forecast: Forecast, path: Path, *, title: str) -> None:
    """Step time and MFU against GPUs, as a PNG.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 7), dpi=120, sharex=True, height_ratios=(2.2, 1), layout="constrained"
    )
    counts = gpu_counts(forecast.cluster, most=2 * _limit(forecast.plan, micro_batch=1))
    micro_batches = list(dict.fromkeys(point.estimate.micro_batch for point in points))
    colours = dict(zip(micro_batches, plt.get_cmap("viridis")(_even(len(micro_batches), most=0.85)), strict=True))
    first = min(points, key=lambda point: point.gpus)
    ideal = [first.estimate.time.total * first.gpus / gpus for gpus in counts]
    above.plot(counts, ideal, color="#9ca3af", linestyle=":", linewidth=1.2, label="perfect scaling")
    for micro_batch in reversed(micro_batches):
        own = [point for point in points if point.estimate.micro_batch == micro_batch]
        _draw_line(above, below, own, forecast, colours[micro_batch])
    _mark_ends(above, forecast, counts, colour=colours[micro_batches[0]])
    _mark_recipe(above, forecast, counts)
    times = [point.estimate.time.total for point in points]
    above.set(xscale="log", yscale="log", ylabel="seconds a step", ylim=(0.3 * min(times), 2.5 * max(times)))
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.yaxis.set_minor_formatter(NullFormatter())
    title = f"{title}: {plural(forecast.plan.batch.global_batch, 'sequence')} a step"
    above.set_title(title, loc="left", fontsize=12, pad=12)
    below.set(xscale="log", xlabel="GPUs", ylabel="MFU, %", ylim=(0, None), xlim=(0.85 * counts[0], 1.15 * counts[-1]))
    there = sorted({point.gpus for point in points})
    below.set_xticks(there, [f"{gpus:,}" for gpus in there])
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(fontsize=9, loc="lower left", edgecolor="none", framealpha=0.9)
    reached = f"Estimates. Forward and backward passes are assumed to reach {forecast.assumed.compute:.0%} of the data "
    figure.supxlabel(
        reached + "sheet's FLOP/s at every micro-batch; small ones reach less.", fontsize=8, x=0.01, ha="left"
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)


def _even(count: int, *, most: float) -> list[float]:
    """From 0 to `most`: as many numbers at equal distances."""
    return [most * index / max(1, count - 1) for index in range(count)]


def _draw_line(above: Any, below: Any, points: Sequence[Point], forecast: Forecast, colour: Any) -> None:
    """One micro-batch; hollow marks where it does not fit the GPU's memory."""
    gpus = [point.gpus for point in points]
    micro_batch = points[0].estimate.micro_batch
    fits = [point.estimate.memory.total <= forecast.usable_memory for point in points]
    label = f"micro-batch {micro_batch}, up to {plural(_limit(forecast.plan, micro_batch=micro_batch), 'GPU')}"
    label += "" if all(fits) else "; hollow: too large for the memory"
    series = (
        (above, [point.estimate.time.total for point in points]),
        (below, [100 * point.estimate.mfu for point in points]),
    )
    for axes, values in series:
        axes.plot(gpus, values, color=colour, linewidth=1.6, label=label)
        for x, y, fit in zip(gpus, values, fits, strict=True):
            axes.plot(x, y, "o", color=colour, markersize=5, markerfacecolor=colour if fit else "white")


def _limit(plan: Plan, *, micro_batch: int) -> int:
    """GPUs at which the accumulation is down to 1: the batch cannot be spread over more."""
    return plan.batch.global_batch // micro_batch * plan.config.model.tensor_parallel


def _mark_ends(axes: Any, forecast: Forecast, counts: Sequence[int], *, colour: Any) -> None:
    """Where the recipe's micro-batch ends, and where the last sequence has its rank."""
    micro_batch = forecast.plan.batch.micro_batch
    own, last = (_limit(forecast.plan, micro_batch=size) for size in (micro_batch, 1))
    top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 9}
    if own <= counts[-1]:
        axes.axvline(own, color=colour, linewidth=1, linestyle="--")
        text = f"micro-batch {micro_batch} ends at {plural(own, 'GPU')}: accumulation 1"
        axes.annotate(text, (own, 0.98), color=colour, **_beside(own, counts), **top)
    if last < counts[-1]:
        axes.axvspan(last, 1.15 * counts[-1], color="#e5e7eb", zorder=0)
        text = "no sequences for more GPUs"
        axes.annotate(text, (last, 0.9), xytext=(6, 0), ha="left", color="#4b5563", rotation=90, **top)


def _mark_recipe(axes: Any, forecast: Forecast, counts: Sequence[int]) -> None:
    """The launch that was asked for."""
    gpus, time = forecast.cluster.gpus, forecast.recipe.time.total
    axes.plot(gpus, time, "*", color="black", markersize=13, zorder=5)
    text = f"this launch: {plural(gpus, 'GPU')}, {in_seconds(time)}, accumulation {forecast.recipe.accumulation}"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    place = _beside(gpus, counts, up=8)
    axes.annotate(text, (gpus, time), textcoords="offset points", fontsize=9, bbox=box, **place)


def _beside(gpus: int, counts: Sequence[int], *, up: int = 0) -> dict[str, Any]:
    """Text on the side of a place on the axis on which there is more room."""
    left = gpus**2 > counts[0] * counts[-1]
    return {"xytext": (-8 if left else 8, up), "ha": "right" if left else "left"}
