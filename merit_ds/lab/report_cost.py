# SPDX-License-Identifier: Apache-2.0
"""The report's section on what a step costs: seconds and FLOP/s by optimizer and model."""

from collections.abc import Mapping, Sequence, Set
from functools import partial
from statistics import median

from merit_ds.lab.figures import look, ordered, three_digits
from merit_ds.lab.figures_cost import draw_cost
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run, number
from merit_ds.lab.report_statistics import steady_median

WARM_UP = 10
"""Steps that are left out: caches fill, libraries load, kernels compile."""


def cost_section(runs: Sequence[Run], links: Links) -> Section | None:
    """Medians over runs of each run's median step, for each model, batch and device."""
    section = Section("Time a step and FLOP/s", "cost")
    section.text.append(
        f"The median step of each run after its first {WARM_UP}, evaluation and saving not counted, then the median "
        "over runs. FLOP/s are the model's own, without recomputation, for each rank."
    )
    groups: dict[tuple[str, int, str], dict[str, list[Run]]] = {}
    for run in runs:
        if run.variant is None and _seconds(run) is not None:
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
        seconds = {name: median(_seconds(run) or 0.0 for run in group[name]) for name in ordered(group)}
        ratios = ratios_to_adamw(seconds, alone={name for name in group if all(_jobs(r) == 1 for r in group[name])})
        where = f"{model}\nbatch {batch:,}" + (f", {device}" if len({d for _, _, d in groups}) > 1 else "")
        drawn[where] = {name: (seconds[name], ratios[name]) for name in seconds}
        rows += [_row(model, batch, device, n, group[n], seconds[n], ratios[n], links) for n in seconds]
    caption = "Seconds a step by optimizer, and the ratio to AdamW's in the same panel. Beside the paper's table 2."
    columns = ["model", "batch", "optimizer", "s a step", "to AdamW", "GFLOP/s a rank", "runs", "device"]
    section.parts += [Plot("cost", caption, partial(draw_cost, drawn)), Table("Time a step", columns, rows)]
    return section


def ratios_to_adamw(seconds: Mapping[str, float], *, alone: Set[str]) -> dict[str, float | None]:
    """Each optimizer's seconds a step over AdamW's; None where there is no AdamW, or where either is not `alone`.

    Args:
        alone: the optimizers whose runs had the machine for themselves.
    """
    base = next((name for name in seconds if name.casefold() == "adamw" and name in alone), None)
    return {name: seconds[name] / seconds[base] if base and name in alone else None for name in seconds}


def _jobs(run: Run) -> int:
    """How many runs went on at the same time on its machine."""
    return int(number(run.result.get("jobs")) or 1)


def _seconds(run: Run) -> float | None:
    measured = steady_median(run.curve("seconds"), warm_up=WARM_UP)
    return measured if measured is not None else number(run.result.get("seconds_per_step"))


def _tflops(run: Run) -> float | None:
    measured = steady_median(run.curve("tflops_per_gpu"), warm_up=WARM_UP)
    return measured if measured is not None else number(run.result.get("tflops_per_gpu"))


def _row(
    model: str,
    batch: int,
    device: str,
    name: str,
    runs: Sequence[Run],
    seconds: float,
    ratio: float | None,
    links: Links,
) -> list[Cell]:
    speeds = [speed for run in runs if (speed := _tflops(run)) is not None]
    parts: list[tuple[str, str | None]] = []
    for run in runs:
        parts += [(" " if parts else "", None), (three_digits(_seconds(run) or 0.0), links.run(run))]
    return [
        cell(model),
        cell(f"{batch:,}"),
        cell(name, colour=look(name)[0]),
        cell(three_digits(seconds)),
        cell("-" if ratio is None else f"{ratio:.3f}"),
        cell(f"{median(speeds) * 1000:,.4g}" if speeds else "-"),
        Cell(tuple(parts)),
        cell(device),
    ]
