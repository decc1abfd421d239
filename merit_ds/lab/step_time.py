# SPDX-License-Identifier: Apache-2.0
"""What a step of a run takes in the long run, from its metrics."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, mode
from typing import Any

from merit_ds import OPTIMIZERS

WARM_UP = 10
"""Steps that are left out: caches fill, libraries load, kernels compile."""
_INTERVALS = {
    kind.__name__: found["hessian_interval"].default
    for kind in OPTIMIZERS
    if "hessian_interval" in (found := inspect.signature(kind).parameters)
}


def period_of(deepspeed: Mapping[str, Any]) -> int:
    """Every how many steps the optimizer of a DeepSpeed JSON does what it does in no other: Sophia-G's Hessian."""
    optimizer = deepspeed["optimizer"]
    return int(optimizer.get("params", {}).get("hessian_interval", _INTERVALS.get(optimizer["type"], 1)))


def seconds_a_step(metrics: Sequence[Mapping[str, Any]], *, period: int) -> float | None:
    """The mean over a period's steps of what each of them usually takes.

    A median over all steps would pass over work that only some of them do, and a mean would count every hiccup of a
    shared machine. So of the first steps of all periods the median is taken, of the second ones, and so on; then the
    mean of these medians. With a period of 1 it is the median.

    Args:
        metrics: a run's rows, by ascending `iteration`; `seconds` are those of a step, averaged since the row before.
        period: in steps.

    Returns:
        None where the rows hold no whole period. The first WARM_UP steps count only where they are needed for one, the
        first row only where it is all that there is.
    """
    rows = [(row["iteration"], row["seconds"]) for row in _timed(metrics)]
    if not rows:
        return None
    interval = mode(after - before for before, after in pairwise([0, *(step for step, _ in rows)]))
    # Of the last step, or of a bad one, there may be a row between two regular ones.
    regular = [(step, seconds) for step, seconds in rows if step % interval == 0]
    for used in ([row for row in regular if row[0] > WARM_UP], regular[1:], rows[:1]):
        phases: dict[int, list[float]] = {}
        for step, seconds in used:
            phases.setdefault(step % period, []).append(seconds)
        if len(phases) == period // math.gcd(period, interval):
            return fmean(map(median, phases.values()))
    return None


def tflops_a_rank(metrics: Sequence[Mapping[str, Any]], *, period: int) -> float | None:
    """The model's FLOPs of a step, as many in each, over the seconds that it takes; None as there."""
    seconds = seconds_a_step(metrics, period=period)
    work = [row["seconds"] * row["tflops_per_gpu"] for row in _timed(metrics) if "tflops_per_gpu" in row]
    return median(work) / seconds if seconds and work else None


def _timed(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (row for row in metrics if "seconds" in row and math.isfinite(row["seconds"]))
