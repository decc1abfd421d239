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
    above.plot(GPU_COUNTS, ideal, color="#9ca3af", linestyle=":", linewidth=1.2, label="as much faster as more GPUs")
    for micro_batch, colour in reversed(list(zip(micro_batches, _COLOURS, strict=False))):
        own = [point for point in points if point.estimate.micro_batch == micro_batch]
        _draw_line(above, below, own, forecast, colour)
    _mark_ends(above, points, forecast, micro_batches)
    above.set(xscale="log", yscale="log", ylabel="seconds a step (estimate)")
    above.set_title(f"{title}: {forecast.plan.batch.global_batch:,} sequences a step", loc="left", fontsize=12)
    below.set(xscale="log", xlabel="GPUs", ylabel="MFU, %", ylim=(0, None))
    below.set_xticks(GPU_COUNTS, [f"{gpus:,}" for gpus in GPU_COUNTS])
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, fontsize=9, loc="lower left")
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
    label = f"micro-batch {micro_batch}" + ("" if all(fits) else ", hollow: too large for the memory")
    series = (
        (above, [point.estimate.time.total for point in points]),
        (below, [100 * point.estimate.mfu for point in points]),
    )
    for axes, values in series:
        axes.plot(gpus, values, color=colour, linewidth=1.6, label=label)
        for x, y, fit in zip(gpus, values, fits, strict=True):
            axes.plot(x, y, "o", color=colour, markersize=5, markerfacecolor=colour if fit else "white")


def _mark_ends(axes: Any, points: Sequence[Point], forecast: Forecast, micro_batches: Sequence[int]) -> None:
    """Where the accumulation is down to 1: the batch cannot be spread over more GPUs at this micro-batch."""
    tensor = forecast.paper.config.model.tensor_parallel
    for micro_batch, colour in zip(micro_batches, _COLOURS, strict=False):
        limit = forecast.plan.batch.global_batch // micro_batch * tensor
        if limit > GPU_COUNTS[-1]:
            continue
        axes.axvline(limit, color=colour, linewidth=1, linestyle="--", alpha=0.7)
        axes.annotate(
            f"micro-batch {micro_batch} ends at {limit:,} GPUs: accumulation 1",
            (limit, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color=colour,
        )
