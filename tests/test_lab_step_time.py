# SPDX-License-Identifier: Apache-2.0
"""Seconds a step: periodic work by its share, hiccups not at all."""

import json
import math
import random
from pathlib import Path

import pytest

from merit_ds.lab.points import expand
from merit_ds.lab.recipe import plan_run
from merit_ds.lab.result import write_result
from merit_ds.lab.step_time import period_of, seconds_a_step, tflops_a_rank
from merit_ds.lab.study import load_study

STUDY = Path(__file__).parents[1] / "configs/studies/small/gpt2.yaml"
PERIOD, USUAL, HESSIAN = 10, 0.06, 0.1
LONG_RUN = (9 * USUAL + HESSIAN) / 10


def metrics(steps: int, *, interval: int = 1, hiccups: float = 0.0) -> list[dict[str, float]]:
    """Rows of a run whose steps 1, 11, 21, ... are longer, whose first ten are slow, and some of whose steps hang."""
    chance = random.Random(1)
    rows, seconds = [], []
    for step in range(1, steps + 1):
        seconds.append(HESSIAN if step % PERIOD == 1 else USUAL)
        seconds[-1] *= 5 if step <= 10 else 1
        seconds[-1] += 3 if chance.random() < hiccups else 0
        if step % interval == 0 or step == steps:
            mean = sum(seconds) / len(seconds)
            rows.append({"iteration": step, "seconds": mean, "tflops_per_gpu": 0.12 / mean, "loss": 1.0})
            seconds = []
    return [{"iteration": 0, "valid_loss": 5.0}, *rows, {"iteration": steps, "valid_loss": 1.0}]


@pytest.mark.parametrize("interval", [1, 2, 4, 5, 10])
@pytest.mark.parametrize("steps", [81, 150, 203])
def test_work_of_every_tenth_step_counts_a_tenth(steps, interval):
    rows = metrics(steps, interval=interval)
    assert seconds_a_step(rows, period=PERIOD) == pytest.approx(LONG_RUN)
    assert tflops_a_rank(rows, period=PERIOD) == pytest.approx(0.12 / LONG_RUN)


def test_a_median_would_pass_over_it():
    assert seconds_a_step(metrics(150), period=1) == pytest.approx(USUAL)


def test_hiccups_count_nothing():
    rows = metrics(320, hiccups=0.1)
    assert sum(row.get("seconds", 0) > 1 for row in rows) > 20
    assert seconds_a_step(rows, period=PERIOD) == pytest.approx(LONG_RUN)
    assert tflops_a_rank(rows, period=PERIOD) == pytest.approx(0.12 / LONG_RUN)


def test_the_first_steps_do_not_count():
    assert seconds_a_step(metrics(19), period=1) == USUAL  # of all but the first half are slow


def test_the_first_steps_count_where_nothing_else_is_left():
    assert seconds_a_step(metrics(15), period=PERIOD) is not None
    assert seconds_a_step(metrics(8), period=PERIOD) is None  # no whole period
    assert seconds_a_step(metrics(3), period=1) == pytest.approx(5 * USUAL)  # all but the first
    assert seconds_a_step(metrics(1), period=1) == pytest.approx(5 * HESSIAN)
    assert seconds_a_step(metrics(0), period=1) is None and tflops_a_rank([], period=1) is None


def test_a_time_that_is_not_finite_is_none():
    rows = metrics(12)
    rows[11]["seconds"] = math.nan
    assert seconds_a_step(rows, period=1) == USUAL


def test_the_period_is_the_optimizers():
    assert period_of({"optimizer": {"type": "MeritSophiaG", "params": {"hessian_interval": 7}}}) == 7
    assert period_of({"optimizer": {"type": "MeritSophiaG"}}) == 10  # its default
    assert period_of({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}) == 1


def test_a_runs_result_counts_it_too(tmp_path):
    study = load_study(STUDY)
    point = next(point for point in expand(study, {}).points if point.cell.optimizer == "Sophia-G")
    plan = plan_run(study, point, folder=STUDY.parent, ranks=1, vocab=False)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(plan.steps)))
    result = write_result(study, plan, tmp_path, succeeded=True, crashed=None, made={})
    assert result["status"] == "done"
    assert result["seconds_per_step"] == pytest.approx(LONG_RUN)
    assert result["tflops_per_gpu"] == pytest.approx(0.12 / LONG_RUN)
