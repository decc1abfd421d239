# SPDX-License-Identifier: Apache-2.0
"""Step time against GPUs, and where the global batch stops scaling: each rank needs a micro-batch of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.plan.forecast import Estimate, Forecast, Paper, estimate
from merit_ds.plan.timing import Assumptions, Cluster
from merit_ds.training.schedule import plan_batch

GPU_COUNTS = tuple(2**power for power in range(3, 13))
"""8 to 4,096."""
# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Point:
    """One number of GPUs, with the recipe's micro-batch or a smaller one."""

    gpus: int
    estimate: Estimate


def curve(paper: Paper, ds_config: dict[str, Any], cluster: Cluster, assumed: Assumptions) -> list[Point]:
    """All powers of two over which the batch can be spread, at the recipe's micro-batch and at each half of the last.

    Args:
        cluster: its GPUs, and how many a node has; smaller counts fill a part of one node.
    """
    tensor = paper.config.model.tensor_parallel
    micro_batch = plan_batch(ds_config, ranks=1).micro_batch
    points = []
    while micro_batch:
        for gpus in GPU_COUNTS:
            here = min(gpus, cluster.gpus_per_node)
            whole_nodes, whole_groups = gpus % here == 0, gpus % tensor == 0
            if whole_nodes and whole_groups and ds_config["train_batch_size"] % (micro_batch * gpus // tensor) == 0:
                part = Cluster(cluster.gpu, gpus // here, here, cluster.network)
                points.append(Point(gpus, estimate(paper, ds_config, part, assumed, micro_batch=micro_batch)))
        micro_batch //= 2
    return points


def draw(points: Sequence[Point], forecast: Forecast, path: Path, *, title: str) -> None:
    """Step time and MFU against GPUs, as a PNG.

    Raises:
        InputError: no number of GPUs fits, or the file cannot be written.
    """
    if not points:
        raise InputError("--plot: no power of two from 8 to 4,096 GPUs fits train_batch_size and the micro-batch")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 7), dpi=120, sharex=True, height_ratios=(2.2, 1), layout="constrained"
    )
    micro_batches = list(dict.fromkeys(point.estimate.micro_batch for point in points))
    first = min(points, key=lambda point: point.gpus)
    ideal = [first.estimate.time.total * first.gpus / gpus for gpus in GPU_COUNTS]
    above.plot(GPU_COUNTS, ideal, color="#9ca3af", linestyle=":", linewidth=1.2, label="perfect scaling")
    for micro_batch, colour in reversed(list(zip(micro_batches, _COLOURS, strict=False))):
        own = [point for point in points if point.estimate.micro_batch == micro_batch]
        _draw_line(above, below, own, forecast, colour)
    _mark_ends(above, forecast)
    _mark_recipe(above, forecast)
    above.set(xscale="log", yscale="log", ylabel="seconds a step", ylim=(0.6 * ideal[-1], 2.5 * ideal[0]))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    title = f"{title}: {forecast.plan.batch.global_batch:,} sequences a step"
    above.set_title(title, loc="left", fontsize=12, pad=12)
    below.set(xscale="log", xlabel="GPUs", ylabel="MFU, %", ylim=(0, None))
    below.set_xticks(GPU_COUNTS, [f"{gpus:,}" for gpus in GPU_COUNTS])
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, fontsize=9, loc="lower left")
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


def _draw_line(above: Any, below: Any, points: Sequence[Point], forecast: Forecast, colour: str) -> None:
    """One micro-batch; hollow marks where it does not fit the GPU's memory."""
    gpus = [point.gpus for point in points]
    micro_batch = points[0].estimate.micro_batch
    fits = [point.estimate.memory.total <= forecast.usable_memory for point in points]
    label = f"micro-batch {micro_batch}, up to {_limit(forecast, micro_batch):,} GPUs"
    label += "" if all(fits) else "; hollow: too large for the memory"
    series = (
        (above, [point.estimate.time.total for point in points]),
        (below, [100 * point.estimate.mfu for point in points]),
    )
    for axes, values in series:
        axes.plot(gpus, values, color=colour, linewidth=1.6, label=label)
        for x, y, fit in zip(gpus, values, fits, strict=True):
            axes.plot(x, y, "o", color=colour, markersize=5, markerfacecolor=colour if fit else "white")


def _limit(forecast: Forecast, micro_batch: int) -> int:
    """GPUs at which the accumulation is down to 1: the batch cannot be spread over more."""
    return forecast.plan.batch.global_batch // micro_batch * forecast.paper.config.model.tensor_parallel


def _mark_ends(axes: Any, forecast: Forecast) -> None:
    """Where the recipe's micro-batch ends, and where the last sequence has its rank."""
    most, micro_batch = GPU_COUNTS[-1], forecast.plan.batch.micro_batch
    axes.set_xlim(0.85 * GPU_COUNTS[0], 1.15 * most)
    own, last = _limit(forecast, micro_batch), _limit(forecast, 1)
    top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 9}
    if own <= most:
        axes.axvline(own, color=_COLOURS[0], linewidth=1, linestyle="--")
        text = f"micro-batch {micro_batch} ends at {own:,} GPUs: accumulation 1"
        left = own > GPU_COUNTS[len(GPU_COUNTS) // 2]
        axes.annotate(
            text, (own, 0.98), xytext=(-5 if left else 5, 0), ha="right" if left else "left", color=_COLOURS[0], **top
        )
    if last < most:
        axes.axvspan(last, 1.15 * most, color="#e5e7eb", zorder=0)
        axes.annotate("no sequences for more GPUs", (last, 0.9), xytext=(6, 0), ha="left", color="#4b5563", **top)


def _mark_recipe(axes: Any, forecast: Forecast) -> None:
    """The launch that was asked for."""
    gpus, seconds = forecast.cluster.gpus, forecast.recipe.time.total
    axes.plot(gpus, seconds, "*", color="black", markersize=13, zorder=5)
    accumulation = forecast.recipe.accumulation
    axes.annotate(
        f"this launch: {gpus:,} GPUs, {seconds:.2f} s, accumulation {accumulation}",
        (gpus, seconds),
        xytext=(10, 8),
        textcoords="offset points",
        fontsize=9,
    )
