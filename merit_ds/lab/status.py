# SPDX-License-Identifier: Apache-2.0
"""What `python -m merit_ds.lab status DIR` prints: a study's folder as it is, while it is worked on or not."""

import json
import math
from collections import Counter
from pathlib import Path

from merit_ds.lab.attempts import is_locked
from merit_ds.lab.points import Point, Tuning, expand
from merit_ds.lab.recipe import DEEPSPEED
from merit_ds.lab.result import FAILED, last_iteration, losses_of, read_results
from merit_ds.lab.study import load_study


def describe(output: Path) -> list[str]:
    """Lines on grids, on runs that go on or failed, and on learning rates.

    Raises:
        InputError: the folder holds no study.
    """
    study = load_study(output / "study.yaml")
    results = read_results(output)
    expansion = expand(study, losses_of(results))
    states = {point: _state(output, point, results) for point in expansion.points}
    lines = []
    for grid in dict.fromkeys(grid.name for grid in study.grids):
        counts = Counter(state for point, state in states.items() if point.grid == grid)
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines.append(f"grid {grid}: {text or 'no run known yet'}")
    waiting = sum(expansion.waiting.values())
    if waiting:
        lines.append(f"{waiting} runs wait for a best learning rate")
    for point, state in states.items():
        if state == "running":
            lines.append(f"  running  {point.id}: step {_steps(output, point)}")
        elif state == FAILED:
            lines.append(f"  failed   {point.id}: {results[point.id]['reason']}")
    for tuning in expansion.tunings.values():
        lines.append(_describe_tuning(tuning))
        lines += describe_doubts(tuning)
    return lines


def describe_doubts(tuning: Tuning) -> list[str]:
    """Warnings where runs of a list failed, or its best learning rate is the first or last of those left."""
    lines = []
    if tuning.failed:
        lines.append(
            f"WARNING   {tuning.cell}: failed and left out of the choice of a learning rate: "
            f"{', '.join(tuning.failed)}; --retry-failed does them again"
        )
    if tuning.edge is not None:
        rates = ", ".join(f"{rate:g}" for rate, loss in tuning.losses.items() if loss is None or not math.isnan(loss))
        lines.append(
            f"WARNING   {tuning.cell}: the best learning rate {tuning.best:g} is the {tuning.edge}est of {rates}; "
            "a better one may lie outside: widen the grid"
        )
    return lines


def _state(output: Path, point: Point, results: dict[str, dict[str, str]]) -> str:
    folder = output / "runs" / point.id
    if point.id in results:
        return results[point.id]["status"]
    if is_locked(folder):
        return "running"
    return "interrupted" if (folder / "run.json").exists() else "to do"


def _steps(output: Path, point: Point) -> str:
    folder = output / "runs" / point.id
    deepspeed = json.loads((folder / DEEPSPEED).read_text(encoding="utf-8"))
    return f"{last_iteration(folder)} of {deepspeed['scheduler']['params']['total_num_steps']}"


def _describe_tuning(tuning: Tuning) -> str:
    def show(rate: float, loss: float | None) -> str:
        text = "?" if loss is None else f"{loss:.4f}".replace("inf", "diverged").replace("nan", "failed")
        return f"{rate:g}: {text}" + (" (best)" if rate == tuning.best else "")

    return f"{tuning.cell}: " + ", ".join(show(rate, loss) for rate, loss in tuning.losses.items())
