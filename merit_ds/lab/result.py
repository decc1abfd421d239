# SPDX-License-Identifier: Apache-2.0
"""What came out of a run: `result.json`, written last, so a run that has it is finished; and `results.jsonl`."""

import json
import math
import os
import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.lab.attempts import exclusive, wall_seconds
from merit_ds.lab.points import Cell, Point
from merit_ds.lab.recipe import RESULT, RunPlan
from merit_ds.lab.report_runs import shorten_paths
from merit_ds.lab.step_time import period_of, seconds_a_step, tflops_a_rank
from merit_ds.lab.study import Study
from merit_ds.training.manifest import write_text
from merit_ds.training.report import RunFolder

RESULTS, LOG = "results.jsonl", "log.txt"
DONE, DIVERGED, FAILED = "done", "diverged", "failed"
_BAD_STEPS = re.compile(r"error: (step \d+ ended with .*?bad steps in a row)")


def final_loss(rows: list[dict[str, Any]], *, steps: int) -> float | None:
    """The validation loss after the last step, in nats a token; None if the run has not come that far."""
    return next((row["valid_loss"] for row in rows if row["iteration"] == steps and "valid_loss" in row), None)


def last_iteration(folder: Path) -> int:
    """The last step in a run's metrics, 0 where there is none; reads the end of the file alone."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["iteration"]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def judge(folder: Path, *, steps: int, succeeded: bool, crashed: str | None = None) -> tuple[str, str | None]:
    """Status and reason of a run whose trainer has ended by itself.

    A run diverged if too many steps in a row had a non-finite loss or overflowed, or if its last validation loss is not
    finite or above the first one. It failed if its trainer ended with an error for any other reason.
    """
    rows = RunFolder(folder).rows()
    last, first = final_loss(rows, steps=steps), final_loss(rows, steps=0)
    if last is None or not succeeded:
        if bad := _BAD_STEPS.search(_log(folder)):
            return DIVERGED, bad[1]
        return FAILED, f"{crashed}: {last_error(folder)}" if crashed else last_error(folder)
    if not math.isfinite(last):
        return DIVERGED, "the last validation loss is not finite"
    if first is not None and last > first:
        return DIVERGED, f"the last validation loss, {last:.4f}, is above the first, {first:.4f}"
    return DONE, None


def write_result(
    study: Study, plan: RunPlan, folder: Path, *, succeeded: bool, crashed: str | None, made: dict[str, Any]
) -> dict[str, Any]:
    """Judge a run that has ended and write its `result.json`, atomically; returns its content.

    Numbers that are not finite become null. `seconds_per_step` and `tflops_per_gpu` are as in `step_time.py`;
    `wall_seconds` includes starting, evaluation, saving and every interrupted attempt; `git` names the revision of
    each start.

    Args:
        succeeded: whether the trainer ended without an error.
        crashed: the signal by which it ended through its own fault, if one did, with what is known of it.
        made: what the lab alone knows of how it was made.
    """
    status, reason = judge(folder, steps=plan.steps, succeeded=succeeded, crashed=crashed)
    rows = RunFolder(folder).rows()
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row and math.isfinite(row["valid_loss"])]
    period = period_of(plan.deepspeed)
    last = final_loss(rows, steps=plan.steps)
    path = folder / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result = {
        "id": plan.point.id,
        "point": describe(study, plan.point),
        "status": status,
        "reason": reason,
        "steps": plan.steps,
        "initial_valid_loss": final_loss(rows, steps=0),
        "final_valid_loss": last if last is not None and math.isfinite(last) else None,
        "best_valid_loss": min(valid, default=None),
        "seconds_per_step": seconds_a_step(rows, period=period),
        "tflops_per_gpu": tflops_a_rank(rows, period=period),
        "wall_seconds": wall_seconds(folder),
        "git": ", ".join(dict.fromkeys(start["git"] for start in run.get("starts", ()) if start["git"])) or None,
        "versions": run.get("versions"),
        "time": datetime.now().isoformat(timespec="seconds"),
        "device": run.get("gpu") or (f"cpu ({run['machine']})" if run else None),
    } | made
    write_text(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def describe(study: Study, point: Point) -> dict[str, Any]:
    """A point for `result.json`; an ablation stands under the optimizer that it ablates."""
    base = study.optimizers[point.cell.optimizer].lr_of
    values = asdict(point.cell) | {"lr": point.lr, "seed": point.seed, "grid": point.grid, "ablation": None}
    return values if base is None else values | {"optimizer": base, "ablation": point.cell.optimizer}


def read_results(output: Path) -> dict[str, dict[str, Any]]:
    """id -> result of every finished run in a study's folder.

    Raises:
        InputError: a result.json is not the JSON that was written.
    """
    results = {}
    for path in sorted(output.glob(f"runs/*/{RESULT}")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            results[str(result["id"])] = result
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not a run's result; remove it to do the run again") from None
    return results


def losses_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """id -> final validation loss; infinity where the run diverged, NaN where it failed."""
    other = {DIVERGED: math.inf, FAILED: math.nan}
    return {id_: other.get(row["status"], row["final_valid_loss"]) for id_, row in results.items()}


def write_results(output: Path) -> None:
    """Write `results.jsonl` anew from the runs' results; other processes of the same study wait for it."""
    with exclusive(output / "results.lock"):
        rows = [result | {"folder": f"runs/{id_}"} for id_, result in read_results(output).items()]
        write_text(output / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


def write_tunings(output: Path, tunings: dict[Cell, Any]) -> None:
    """Write `tuning.json`: every list of learning rates with its losses, the best, and whether that lies at an edge.

    A loss is null where a run is not finished, "inf" where one diverged, "nan" where all failed.
    """
    rows = [
        asdict(cell)
        | {"best": tuning.best, "edge": tuning.edge, "added": tuning.added, "failed": tuning.failed}
        | {
            "losses": {
                f"{lr:g}": loss if loss is None or math.isfinite(loss) else str(loss)
                for lr, loss in tuning.losses.items()
            }
        }
        for cell, tuning in tunings.items()
    ]
    with exclusive(output / "results.lock"):
        write_text(output / "tuning.json", json.dumps(rows, indent=1) + "\n")


def _log(folder: Path) -> str:
    return (folder / LOG).read_text(encoding="utf-8", errors="replace") if (folder / LOG).exists() else ""


def last_error(folder: Path) -> str:
    """Of a run's log the last line that looks like an error, else the last line; absolute paths lose their folders."""
    lines = [line.strip() for line in _log(folder).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    last = (errors or lines or ["it ended without a word"])[-1].removeprefix("error: ")
    return shorten_paths(last)[:500]
