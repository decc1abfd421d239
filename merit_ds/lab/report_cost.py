# SPDX-License-Identifier: Apache-2.0
"""The report's section on what a step costs: seconds and FLOP/s by optimizer and model."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

from merit_ds.lab.figures import look, ordered, three_digits
from merit_ds.lab.figures_cost import draw_cost
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run, number
from merit_ds.lab.step_time import WARM_UP, period_of, seconds_a_step, tflops_a_rank

AGREE = 0.05
"""How far from an optimizer's median, as a share of it, the quartiles of its runs' times may lie."""


@dataclass(frozen=True)
class Times:
    """Seconds a step of one optimizer's runs of a model and batch on a device."""

    seconds: Sequence[float]
    alone: bool
    """Whether each run had the machine for itself, as far as the lab knows."""

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def agree(self) -> bool:
        """Whether the middle half lies near the median: else something else went on beside too many of the runs.

        Of five runs or more one may be off by any factor; of three none, as it could as well be the right one.
        """
        if len(self.seconds) == 1:
            return True
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return max(high - self.median, self.median - low) <= AGREE * self.median

    @property
    def comparable(self) -> bool:
        return self.alone and self.agree


def cost_section(runs: Sequence[Run], links: Links) -> Section | None:
    """Medians over runs of what a step takes, for each model, batch and device."""
    section = Section("Time a step and FLOP/s", "cost")
    section.text.append(
        f"What a step of each run usually takes after its first {WARM_UP}, evaluation and saving not counted, and "
        "Sophia-G's Hessian by its share; then the median over runs. FLOP/s are the model's own, without "
        "recomputation, for each rank. Times are compared, and drawn, where each run had the machine for itself and "
        f"the middle half of an optimizer's lies within {AGREE:.0%} of their median."
    )
    groups: dict[tuple[str, int, str], dict[str, list[Run]]] = {}
    for run in runs:
        if run.variant is None and run_seconds(run) is not None:
            key = (run.family.title, run.batch, str(run.result.get("device") or "device not recorded"))
            groups.setdefault(key, {}).setdefault(run.optimizer, []).append(run)
    if not groups:
        return None
    jobs = max(_jobs(run) for run in runs)
    if jobs > 1:
        section.warnings.append(
            f"up to {jobs} of these runs went on at the same time on one machine: their times compare nothing. Run the "
            "study with --jobs 1 for times."
        )
    rows: list[list[Cell]] = []
    drawn = {}
    for (model, batch, device), group in sorted(groups.items()):
        times = {name: _times(group[name]) for name in ordered(group)}
        where = f"{model}\nbatch {batch:,}" + (f", {device}" if len({d for _, _, d in groups}) > 1 else "")
        ratios = ratios_to_adamw(times)
        bars = {name: (found.median, ratios[name]) for name, found in times.items() if found.comparable}
        if len(bars) > 1:
            drawn[where] = bars
        rows += [_row(model, batch, device, n, group[n], times, links) for n in times]
    if drawn:
        caption = "Seconds a step by optimizer, and the ratio to AdamW's in the same panel. Beside the paper's table 2."
        section.parts.append(Plot("cost", caption, partial(draw_cost, drawn)))
    columns = ["model", "batch", "optimizer", "s a step", "to AdamW", "GFLOP/s a rank", "runs", "device"]
    section.parts.append(Table("Time a step", columns, rows))
    return section


def ratios_to_adamw(times: Mapping[str, Times]) -> dict[str, float | None]:
    """Each optimizer's seconds a step over AdamW's; None without AdamW, or where either side compares nothing."""
    base = _adamw(times)
    if base is None or not base.comparable:
        return dict.fromkeys(times)
    return {name: found.median / base.median if found.comparable else None for name, found in times.items()}


def _adamw(times: Mapping[str, Times]) -> Times | None:
    return next((found for name, found in times.items() if name.casefold() == "adamw"), None)


def _times(runs: Sequence[Run]) -> Times:
    return Times([run_seconds(run) or 0.0 for run in runs], alone=all(_jobs(run) == 1 for run in runs))


def _compared(name: str, times: Mapping[str, Times]) -> str:
    """The ratio to AdamW, or why there is none."""
    found, base = times[name], _adamw(times)
    if not found.alone:
        return "not alone"
    if not found.agree:
        return f"times disagree: {three_digits(min(found.seconds))} to {three_digits(max(found.seconds))} s"
    if base is None:
        return "-"
    if not base.comparable:
        return f"AdamW's {'disagree' if base.alone else 'were not alone'}"
    single = " (of a single run)" if 1 in (len(found.seconds), len(base.seconds)) else ""
    return f"{ratios_to_adamw(times)[name]:.3f}{single}"


def _jobs(run: Run) -> int:
    """How many runs went on at the same time on its machine."""
    return int(number(run.result.get("jobs")) or 1)


def run_seconds(run: Run) -> float | None:
    """Seconds a step, of the run's metrics where they are kept, so that all runs are measured in one way."""
    measured = seconds_a_step(run.metrics, period=_period(run))
    return measured if measured is not None else number(run.result.get("seconds_per_step"))


def run_tflops(run: Run) -> float | None:
    """The model's TFLOP/s a rank, likewise."""
    measured = tflops_a_rank(run.metrics, period=_period(run))
    return measured if measured is not None else number(run.result.get("tflops_per_gpu"))


def _period(run: Run) -> int:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        return period_of(json.loads(run.text("deepspeed.json") or "null"))
    return 1


def _row(
    model: str,
    batch: int,
    device: str,
    name: str,
    runs: Sequence[Run],
    times: Mapping[str, Times],
    links: Links,
) -> list[Cell]:
    speeds = [speed for run in runs if (speed := run_tflops(run)) is not None]
    parts: list[tuple[str, str | None]] = []
    for run in runs:
        parts += [(" " if parts else "", None), (three_digits(run_seconds(run) or 0.0), links.run(run))]
    return [
        cell(model),
        cell(f"{batch:,}"),
        cell(name, colour=look(name)[0]),
        cell(three_digits(times[name].median)),
        cell(_compared(name, times)),
        cell(f"{median(speeds) * 1000:,.4g}" if speeds else "-"),
        Cell(tuple(parts)),
        cell(device),
    ]
