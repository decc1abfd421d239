# SPDX-License-Identifier: Apache-2.0
"""A study's YAML, and the runs that follow from it: no run is started here."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_study import ids, loader

from merit_ds.errors import InputError
from merit_ds.lab.laboratory import State
from merit_ds.lab.points import expand
from merit_ds.lab.progress import finish, remaining_seconds, summary
from merit_ds.lab.recipe import check_plan, plan_run, write_plan
from merit_ds.lab.result import judge
from merit_ds.lab.study import load_study
from merit_ds.lab.trainer_process import Machine

REPOSITORY = Path(__file__).parent.parent
STUDIES = sorted((REPOSITORY / "configs" / "studies").rglob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_a_grid_is_every_combination_and_best_ones_wait(load):
    expansion = expand(load(), {})
    expected = [f"AdamW-b8-lr{lr}-s1" for lr in ("0.001", "0.002", "0.004")]
    assert ids(expansion)[:6] == expected + [f"MERIT-b8-lr{lr}-s1" for lr in ("0.01", "0.02", "0.04")]
    assert len(ids(expansion)) == len(set(ids(expansion))) == 12
    assert {str(cell): count for cell, count in expansion.waiting.items()} == {
        "AdamW at batch 8": 3,
        "MERIT at batch 8": 3,
        "AdamW at batch 48": 3,
        "MERIT at batch 48": 3,
        "MERIT without clip at batch 8": 2,
    }


def test_files_follow_from_recipe_study_and_point(load, tmp_path):
    study = load()
    point = expand(study, {}).points[-1]
    assert (point.cell.optimizer, point.cell.batch) == ("MERIT", 48)
    plan = plan_run(study, point, folder=tmp_path, ranks=2, vocab=False)
    assert plan.steps == 81920 // 48 // 32 == 53
    assert plan.recipe["model"]["num_layers"] == 3 and plan.recipe["run"]["sample_tokens"] == 0
    assert plan.recipe["run"]["eval_interval"] == 2 and plan.recipe["run"]["save_interval"] == 5
    assert plan.recipe["data"]["prefix"] == "../../corpus" and "vocab" not in plan.recipe["data"]
    assert plan.deepspeed == {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.5,
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 12,  # 24 a rank, and at most 16
        "optimizer": {"type": "Merit", "params": {"lr": 0.04}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_type": "linear", "cos_min_ratio": 0.1, "total_num_steps": 53, "warmup_num_steps": 1},
        },
    }
    write_plan(tmp_path / "run", plan)
    check_plan(tmp_path / "run", plan)
    changed = load({"model.num_layers: 3": "model.num_layers: 2"})
    other = plan_run(changed, point, folder=tmp_path, ranks=2, vocab=False)
    with pytest.raises(InputError, match=r"recipe.yaml: model.num_layers was 3 and is 2 now.* remove .*run to do"):
        check_plan(tmp_path / "run", other)


def test_the_rest_is_estimated_from_the_nearest_runs_that_are_done(load, tmp_path):
    study = load()
    machine = Machine(tmp_path, jobs=2, ranks=1, threads=3, gpus=())

    def state(*done, **made):
        results = {
            f"AdamW-b{batch}-lr0.00{lr}-s1": {
                "status": "done",
                "wall_seconds": seconds,
                "device": "cpu (x86_64)",
                "ranks": 1,
                "threads": 3,
                "jobs": 2 if lr == 1 else 8,
                "final_valid_loss": 1.0,
                "point": {"model": "default", "batch": batch, "tokens": 81920},
            }
            for batch, lr, seconds in done
        }
        results = {id_: result | made for id_, result in results.items()}
        expansion = expand(study, {id_: 1.0 for id_ in results})
        todo = [point for point in expansion.points if point.id not in results]
        plans = [plan_run(study, point, folder=tmp_path, ranks=1, vocab=False) for point in todo]
        return State(expansion, results, todo=plans)

    assert remaining_seconds(state(), machine) is None and "no estimate" in summary(state(), machine)
    # At batch 8 five listed runs and eight that wait are left; at batch 48 six and six, and nothing is known of it yet.
    assert remaining_seconds(state((8, 1, 100.0)), machine) == pytest.approx(25 * 100)
    assert remaining_seconds(state((8, 1, 100.0), (48, 1, 10.0)), machine) == pytest.approx(13 * 100 + 11 * 10)
    # Runs that were done otherwise count only where there are no others.
    assert remaining_seconds(state((8, 1, 100.0), (48, 2, 10.0)), machine) == pytest.approx(24 * 100)
    assert remaining_seconds(state((8, 1, 10.0), device="NVIDIA H200"), machine) == pytest.approx(25 * 10)
    text = summary(state((8, 1, 1000.0)), machine)
    assert text.startswith(
        "1 done, 0 running, 11 to do, 14 wait for a best learning rate; 3.5 h left (20.8 core-hours)"
    )


def test_before_a_run_is_done_those_that_go_on_tell_how_long_the_rest_takes(load, tmp_path):
    study = load()
    expansion = expand(study, {})
    plans = [plan_run(study, point, folder=tmp_path, ranks=1, vocab=False) for point in expansion.points]
    first = SimpleNamespace(plan=plans[0], folder=tmp_path, started=time.monotonic() - 100.0, begun_at=0)
    state = State(expansion, {}, running=[first], todo=plans[1:])
    row = '{"iteration": %d, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(row % (plans[0].steps // 20))
    machine = Machine(tmp_path, jobs=1, ranks=1, threads=3, gpus=())
    assert remaining_seconds(state, machine) is None
    (tmp_path / "metrics.jsonl").write_text(row % (plans[0].steps // 4))
    whole = 100.0 * plans[0].steps / (plans[0].steps // 4)
    left = len(plans) - 1 + sum(expansion.waiting.values()) + 1 - (plans[0].steps // 4) / plans[0].steps
    assert remaining_seconds(state, machine) == pytest.approx(left * whole, rel=1e-3)
    assert re.search(r"done about \w{3} \d\d:\d\d$", finish(5 * 86400, machine))
    assert re.search(r"done about \d\d \w{3} \d\d:\d\d$", finish(9 * 86400, machine))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens: 81_920", "tokesn: 81_920", "unknown key 'tokesn'; did you mean 'tokens'?"),
        ("{type: AdamW,", "{tpye: AdamW,", "unknown key 'optimizers.AdamW.tpye'; did you mean 'type'?"),
        ("batch: [8], seed", "bacth: [8], seed", "unknown key 'grids.2.bacth'; did you mean 'batch'?"),
        ("optimizer: [MERIT without", "optimizer: [MERIT with", "'MERIT with clip' is not defined; there are AdamW"),
        ("lr_of: MERIT", "lr_of: MERRIT", "optimizers.MERIT without clip.lr_of: 'MERRIT' is not defined"),
        ("{eps: 1e-8}", "{lr: 1e-8}", "write lr in grids"),
        ("MERIT: {\n", "MERITT: {\n", "lr names 'MERITT', which is not in the grid's optimizer list"),
        ("[1e-3, 2e-3, 4e-3]", "[1e-3, -2e-3]", "lr of AdamW must be positive numbers"),
        ("factor: 2", "factor: 1", "factor must be above 1"),
        ("MERIT: {type: Merit}", "AdamW: {type: Merit}", "key 'AdamW' is given twice"),
        ("MERIT without clip: {", "MERIT_without clip: {type: Merit}\n  MERIT without clip: {", "same folder name"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(load, old, new, message):
    with pytest.raises(InputError) as caught:
        load({old: new})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{model.num_layers: 3}", "{model.num_layer: 3}", "unknown key 'model.num_layer'"),
        ("{model.num_layers: 3}", "{run.seed: 3}", "run.seed is the lab's to set"),
        ("tokens: 81_920", "tokens: 100", "less than one step"),
        ("{type: Merit}", "{type: Merit, params: {weight_deacy: 1}}", "did you mean 'weight_decay'?"),
        ("tokens: 81_920", "tokens: 2600\nwarmup: 0.97", "warmup_num_steps is 10, but the run has 10 steps"),
    ],
)
def test_a_study_that_its_recipe_does_not_fit_is_refused_before_a_run(load, tmp_path, old, new, message):
    study = load({old: new})
    with pytest.raises(InputError) as caught:
        for point in expand(study, {}).points:
            plan_run(study, point, folder=tmp_path, ranks=1, vocab=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("log", "rows", "succeeded", "status", "reason"),
    [
        (
            "step\nerror: /home/me/x/lock: left by a build: rm /home/me/x/lock\n",
            [],
            False,
            "failed",
            "…/lock: left by a",
        ),
        (
            "Traceback\n  at line\ntorch.OutOfMemoryError: no memory\nbye\n",
            [4.0],
            False,
            "failed",
            "OutOfMemoryError: no",
        ),
        (
            "x\nerror: step 7 ended with a non-finite loss, the last of 2 bad steps in a row (run)\n",
            [4.0],
            False,
            "diverged",
            "step 7 ended with a non-finite loss",
        ),
        ("fine\n", [4.0, 3.0], True, "done", None),
        ("fine\n", [4.0, 5.0], True, "diverged", "5.0000, is above the first, 4.0000"),
        ("fine\n", [4.0, math.nan], True, "diverged", "not finite"),
        ("OSError: no space left\n", [4.0, 3.0], False, "failed", "no space left"),
        ("", [], False, "failed", "without a word"),
    ],
)
def test_how_a_run_ended_is_told_from_its_files(tmp_path, log, rows, succeeded, status, reason):
    (tmp_path / "log.txt").write_text(log)
    metrics = [{"iteration": 10 * index, "valid_loss": loss} for index, loss in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    found = judge(tmp_path, steps=10, succeeded=succeeded)
    assert found[0] == status and (found[1] is None if reason is None else reason in found[1])
    assert "/home" not in str(found[1])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(REPOSITORY / "configs" / "studies")))
def test_every_study_of_the_project_expands_to_runs_that_add_up(path):
    study = load_study(path)
    expansion = expand(study, {})
    # As if every run were done: then those with the best learning rate are known as well.
    while True:
        losses = {point.id: abs(math.log(point.lr / 0.01)) for point in expansion.points}
        grown = expand(study, losses)
        if ids(grown) == ids(expansion):
            break
        expansion = grown
    assert not expansion.waiting and not expansion.hopeless
    assert {point.grid for point in expansion.points} == {grid.name for grid in study.grids}
    for point in expansion.points:
        plan = plan_run(study, point, folder=path.parent, ranks=study.ranks, vocab=False)
        assert plan.steps >= 20


def test_there_are_studies():
    names = {str(path.relative_to(REPOSITORY / "configs" / "studies")) for path in STUDIES}
    full = {"gpt2.yaml", "llama.yaml", "batch_scaling.yaml", "ablations.yaml", "hessian.yaml"}
    small = {"gpt2.yaml", "llama.yaml", "confirmation.yaml", "qk_norm.yaml", "hessian.yaml", "time.yaml"}
    assert names == full | {f"small/{name}" for name in small}
