# SPDX-License-Identifier: Apache-2.0
"""A study's YAML, and the runs that follow from it and from the losses so far: no run is started here."""

import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from merit_ds.errors import InputError
from merit_ds.lab.attempts import begin_attempt, exclusive, try_lock
from merit_ds.lab.laboratory import Laboratory, State, describe_doubts
from merit_ds.lab.points import Cell, expand
from merit_ds.lab.progress import remaining_seconds, summary
from merit_ds.lab.recipe import check_plan, plan_run, write_plan
from merit_ds.lab.result import judge, losses_of
from merit_ds.lab.slurm import resources
from merit_ds.lab.study import load_study
from merit_ds.lab.trainer_process import Machine, TrainerProcess, share_machine, signal_of

REPOSITORY = Path(__file__).parent.parent
STUDIES = sorted((REPOSITORY / "configs" / "studies").rglob("*.yaml"))
RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: tiny.json, train_tokens: 1, sample_tokens: 9}
"""
STUDY = """
base: tiny.yaml
tokens: 81_920
micro_batch: 16
set: {model.num_layers: 3}
deepspeed: {zero_optimization: {stage: 1}}
optimizers:
  AdamW: {type: AdamW, params: {eps: 1e-8}}
  MERIT: {type: Merit}
  MERIT without clip: {type: Merit, params: {clip: null}, lr_of: MERIT}
grids:
  - {name: coarse, optimizer: [AdamW, MERIT], batch: [8, 48], lr: {AdamW: [1e-3, 2e-3, 4e-3], MERIT: {
      from: 1e-2, to: 4e-2, factor: 2}}}
  - {name: seeds, optimizer: [AdamW, MERIT], batch: [8, 48], seed: [1, 2, 3], lr: best}
  - {name: ablations, optimizer: [MERIT without clip], batch: [8], seed: [1, 2], lr: best}
"""
ADAMW, MERIT = Cell("AdamW", "default", 8, 81920), Cell("MERIT", "default", 8, 81920)


@pytest.fixture
def load(tmp_path):
    """A function from changes, old text -> new text, to the study that they make of STUDY."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "tiny.json").write_text(
        '{"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": true},'
        ' "optimizer": {"type": "Merit", "params": {"lr": 1}},'
        ' "gradient_clipping": 0.5}'
    )

    def load_changed(changes=None):
        text = STUDY
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.yaml").write_text(text)
        return load_study(tmp_path / "study.yaml")

    return load_changed


def ids(expansion):
    return [point.id for point in expansion.points]


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


def test_the_best_is_taken_once_every_rate_has_its_loss(load):
    losses = {"MERIT-b8-lr0.01-s1": 2.0, "MERIT-b8-lr0.02-s1": 1.5}
    assert expand(load(), losses).waiting[MERIT] == 3
    expansion = expand(load(), losses | {"MERIT-b8-lr0.04-s1": 1.7})
    assert expansion.tunings[MERIT].best == 0.02 and expansion.tunings[MERIT].edge is None
    assert MERIT not in expansion.waiting and expansion.waiting[ADAMW] == 3
    new = set(ids(expansion)) - set(ids(expand(load(), {})))
    assert new == {
        "MERIT-b8-lr0.02-s2",
        "MERIT-b8-lr0.02-s3",
        "MERIT_without_clip-b8-lr0.02-s1",
        "MERIT_without_clip-b8-lr0.02-s2",
    }


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ((1.0, 2.0, 3.0), 0.01, "low"),
        ((3.0, 2.0, 1.0), 0.04, "high"),
        ((3.0, 2.0, math.inf), 0.02, None),
        ((math.inf, 2.0, math.inf), 0.02, None),
        ((math.inf, math.inf, 2.0), 0.04, "high"),
        ((math.inf, math.inf, math.inf), None, None),
    ],
)
def test_an_edge_is_seen_and_a_diverged_run_is_an_infinite_loss(load, losses, best, edge):
    found = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True)}
    expansion = expand(load(), found)
    assert (expansion.tunings[MERIT].best, expansion.tunings[MERIT].edge) == (best, edge)
    assert (MERIT in expansion.hopeless) == (best is None)


@pytest.mark.parametrize(
    ("losses", "best", "edge", "added"),
    [
        ((math.nan, 2.0, 3.0), 0.02, "low", "0.005"),  # 0.02 is the lowest of those that say anything
        ((3.0, 2.0, math.nan), 0.02, "high", "0.08"),
        ((math.nan, 2.0, math.nan), 0.02, "low", "0.005"),
        ((math.nan, math.inf, math.inf), None, None, "0.005"),
        ((math.inf, math.inf, math.inf), None, None, "0.005"),
        ((math.nan, math.nan, math.nan), None, None, None),
        ((3.0, math.nan, 2.0), 0.04, "high", "0.08"),
    ],
)
def test_a_failed_run_says_nothing_of_its_rate_and_rates_that_all_diverged_were_too_high(
    load, losses, best, edge, added
):
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], extend: 1, lr: {"})
    found = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True)}
    listed = ids(expand(study, {}))
    new = [id_ for id_ in ids(expand(study, found)) if id_ not in listed and id_.startswith("MERIT-b8")]
    assert new == ([] if added is None else [f"MERIT-b8-lr{added}-s1"])
    expansion = expand(load(), found)
    tuning = expansion.tunings[MERIT]
    assert (tuning.best, tuning.edge) == (best, edge) and (MERIT in expansion.hopeless) == (best is None)
    assert list(tuning.failed) == [id_ for id_, loss in found.items() if math.isnan(loss)]
    doubts = describe_doubts(tuning)
    assert any("left out" in doubt and "--retry-failed" in doubt for doubt in doubts) == bool(tuning.failed)
    left = ", ".join(f"{lr:g}" for lr, loss in zip((0.01, 0.02, 0.04), losses, strict=True) if not math.isnan(loss))
    assert edge is None or f"{best:g} is the {edge}est of {left};" in doubts[-1]


def test_a_rate_whose_one_seed_failed_is_judged_by_the_seeds_that_all_rates_have(load):
    """As the report does it, so both name the same rate."""
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], seed: [1, 2], lr: {"})
    losses = {0.01: (2.0, 2.0), 0.02: (1.5, math.nan), 0.04: (1.6, 1.0)}
    found = {f"MERIT-b8-lr{lr}-s{seed}": pair[seed - 1] for lr, pair in losses.items() for seed in (1, 2)}
    tuning = expand(study, found).tunings[MERIT]
    assert tuning.losses == {0.01: 2.0, 0.02: 1.5, 0.04: 1.3} and (tuning.best, tuning.edge) == (0.02, None)


def test_one_status_is_one_kind_of_loss():
    rows = {"a": ("done", 2.0), "b": ("diverged", None), "c": ("failed", None), "d": ("failed", 3.0)}
    losses = losses_of({id_: {"status": status, "final_valid_loss": loss} for id_, (status, loss) in rows.items()})
    assert losses == pytest.approx({"a": 2.0, "b": math.inf, "c": math.nan, "d": math.nan}, nan_ok=True)


def test_one_rate_has_no_edge_and_seeds_are_averaged(load):
    single = load({"{\n      from: 1e-2, to: 4e-2, factor: 2}": "[0.02]"})
    tuning = expand(single, {"MERIT-b8-lr0.02-s1": 1.0}).tunings[MERIT]
    assert (tuning.best, tuning.edge) == (0.02, None)
    two = load({"batch: [8, 48], lr: {": "batch: [8, 48], seed: [1, 2], lr: {"})
    found = {"MERIT-b8-lr0.01-s1": 1.0, "MERIT-b8-lr0.01-s2": 3.0, "MERIT-b8-lr0.02-s1": 1.5, "MERIT-b8-lr0.02-s2": 1.6}
    found |= {"MERIT-b8-lr0.04-s1": 1.4}
    assert expand(two, found).tunings[MERIT].best is None
    tuning = expand(two, found | {"MERIT-b8-lr0.04-s2": math.inf}).tunings[MERIT]
    assert tuning.losses == {0.01: 2.0, 0.02: 1.55, 0.04: math.inf} and tuning.best == 0.02


def test_extend_goes_on_until_the_best_is_inside_or_the_bound_is_met(load):
    study = load({"batch: [8, 48], lr: {": "batch: [8, 48], extend: 2, lr: {"})
    losses = {f"MERIT-b8-lr{lr}-s1": loss for lr, loss in ((0.01, 1.0), (0.02, 2.0), (0.04, 3.0))}
    assert "MERIT-b8-lr0.005-s1" in ids(expand(study, losses))
    assert expand(study, losses).waiting[MERIT] == 3
    inside = expand(study, losses | {"MERIT-b8-lr0.005-s1": 1.1}).tunings[MERIT]
    assert (inside.best, inside.edge, inside.added) == (0.01, None, 1)
    losses |= {"MERIT-b8-lr0.005-s1": 0.9, "MERIT-b8-lr0.0025-s1": 0.8}
    bound = expand(study, losses)
    assert (bound.tunings[MERIT].best, bound.tunings[MERIT].edge) == (0.0025, "low")
    assert not any("lr0.00125" in id_ for id_ in ids(bound)) and "MERIT-b8-lr0.0025-s3" in ids(bound)


def test_a_model_may_take_the_rates_of_another(load):
    models = "models: {plain: {}, deep: {set: {model.num_layers: 4}, micro_batch: 2, lr_of: plain}}\noptimizers:"
    study = load(
        {
            "optimizers:": models,
            "batch: [8, 48], lr: {": "batch: [8, 48], model: [plain], lr: {",
            "batch: [8, 48], seed: [1, 2, 3], lr": "batch: [8], model: [deep], seed: [1], tokens: 163840, lr",
            "batch: [8], seed: [1, 2], lr: best": "batch: [8], model: [deep], seed: [1], lr: best",
        }
    )
    with pytest.raises(InputError, match=r"AdamW at batch 8, model plain \(163840 tokens\)"):
        expand(study, {})


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

    def state(*done):
        results = {
            f"AdamW-b{batch}-lr0.00{lr}-s1": {
                "status": "done",
                "wall_seconds": seconds,
                "final_valid_loss": 1.0,
                "point": {"model": "default", "batch": batch, "tokens": 81920},
            }
            for batch, lr, seconds in done
        }
        expansion = expand(study, {id_: 1.0 for id_ in results})
        todo = [point for point in expansion.points if point.id not in results]
        plans = [plan_run(study, point, folder=tmp_path, ranks=1, vocab=False) for point in todo]
        return State(expansion, results, todo=plans)

    assert remaining_seconds(state()) is None and "no estimate" in summary(state(), machine)
    # At batch 8 five listed runs and eight that wait are left; at batch 48 six and six, and nothing is known of it yet.
    assert remaining_seconds(state((8, 1, 100.0))) == pytest.approx(25 * 100)
    assert remaining_seconds(state((8, 1, 100.0), (48, 1, 10.0))) == pytest.approx(13 * 100 + 11 * 10)
    text = summary(state((8, 1, 1000.0)), machine)
    assert text.startswith(
        "1 done, 0 running, 11 to do, 14 wait for a best learning rate; 3.5 h left (20.8 core-hours)"
    )


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


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (-9, "SIGKILL"),
        (137, "SIGKILL"),
        (247, "SIGKILL"),  # DeepSpeed's launcher, of a rank that was killed
        (245, "SIGSEGV"),
        (-6, "SIGABRT"),
        (143, "SIGTERM"),
        (0, None),
        (1, None),
        (255, None),
    ],
)
def test_an_exit_code_names_its_signal(code, name):
    assert signal_of(code) == name


@pytest.mark.parametrize(("number", "fault"), [(signal.SIGSEGV, True), (signal.SIGABRT, True), (signal.SIGKILL, False)])
def test_a_trainer_that_crashes_has_failed_and_one_that_is_killed_goes_on(load, tmp_path, number, fault):
    """A real process in the trainer's place, which ends itself by the signal."""
    (tmp_path / "trainer.py").write_text(f"import os; print('hm', flush=True); os.kill(os.getpid(), {int(number)})")
    machine = Machine(tmp_path / "trainer.py", jobs=1, ranks=1, threads=1, gpus=())
    plan = plan_run(load(), expand(load(), {}).points[0], folder=tmp_path, ranks=1, vocab=False)
    lock = try_lock(tmp_path / "run")
    assert lock is not None
    process = TrainerProcess(plan, tmp_path / "run", lock=lock, slot=0, machine=machine)
    while not process.ended():
        time.sleep(0.01)
    process.release()
    assert (process.crashed, process.killed) == ((number.name, None) if fault else (None, number.name))
    found = judge(tmp_path / "run", steps=10, succeeded=process.succeeded, crashed=process.crashed)
    assert found == ("failed", f"{number.name}: hm" if fault else "hm")


def test_an_interrupted_run_goes_on_with_its_ranks_alone(load, tmp_path):
    study = load()
    point, run = expand(study, {}).points[0], tmp_path / "run"
    one, two = (plan_run(study, point, folder=tmp_path, ranks=ranks, vocab=False) for ranks in (1, 2))
    two = replace(two, deepspeed=one.deepspeed)  # as of batches that the micro-batch divides either way
    write_plan(run, one)
    begin_attempt(run, log=run / "log.txt", ranks=1)
    check_plan(run, two)  # there is no checkpoint yet
    (run / "latest").write_text("global_step4")
    check_plan(run, one)
    with pytest.raises(InputError, match=r"run: interrupted on 1 ranks, .* give --ranks 1, or remove the folder"):
        check_plan(run, two)
    (run / "result.json").write_text("{}")
    check_plan(run, two)


@pytest.fixture
def laboratory(load, tmp_path):
    """A function from `only` to a laboratory on one rank, and what it told."""

    def make(only):
        machine = Machine(tmp_path, jobs=1, ranks=1, threads=1, gpus=())
        options = {"source": tmp_path, "output": tmp_path / "output", "machine": machine, "data": {}}
        return Laboratory(load(), **options, only=only, tell=print, show=print)

    return make


def test_a_run_that_another_process_has_is_neither_submitted_nor_missed_by_a_task(laboratory, tmp_path):
    whole = laboratory([])
    names = whole.free()
    assert len(names) == 12 and names == [plan.point.id for plan in whole.state.todo]
    lock = try_lock(tmp_path / "output" / "runs" / names[3])
    assert laboratory([]).free() == names[:3] + names[4:]
    task = laboratory([names[3]])
    assert task.unfinished() and not task.left_to_others()
    task.run()  # ends at once, and starts nothing
    assert task.left_to_others() == [names[3]] and not task.unfinished()
    os.close(lock)
    assert laboratory([]).free() == names


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=r"lock: its file system has no flock .*mounted with locks \(Lustre: -o flock"):
        try_lock(tmp_path)
    with pytest.raises(InputError, match="no flock"), exclusive(tmp_path / "results.lock"):
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_login_node_needs_no_gpus_and_a_task_does(tmp_path, monkeypatch):
    script = tmp_path / "trainer.py"
    script.touch()
    monkeypatch.setattr("merit_ds.lab.trainer_process._visible_gpus", lambda: ["0"])
    with pytest.raises(InputError, match="1 jobs of 8 ranks need as many GPUs, but there are 1"):
        share_machine(script, jobs=None, ranks=8)
    assert share_machine(script, jobs=None, ranks=8, starts=False).ranks == 8
    assert share_machine(script, jobs=None, ranks=1, need_gpus=True).gpus == ["0"]
    monkeypatch.setattr("merit_ds.lab.trainer_process._visible_gpus", lambda: [])
    assert share_machine(script, jobs=None, ranks=8).gpus == []
    with pytest.raises(InputError, match="no GPU is visible here; ask for them with --sbatch"):
        share_machine(script, jobs=None, ranks=8, need_gpus=True)


def test_a_task_asks_for_what_its_ranks_need_unless_the_user_does(tmp_path):
    plain = ["--nodes=1", "--ntasks=1", "--cpus-per-task=64"]
    assert resources(8, gpus=True, options=["--partition=x"]) == [*plain, "--gpus-per-node=8"]
    assert resources(8, gpus=False, options=[]) == plain
    for own in ("--gres=gpu:h100:8", "--gpus=8", "-G8", "-G 8", "--gpus-per-task 8"):
        assert resources(8, gpus=True, options=[own]) == plain
    assert resources(1, gpus=True, options=["-c4", "-N 1", "--ntasks=1"]) == ["--gpus-per-node=1"]


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
    small = {"gpt2.yaml", "llama.yaml", "confirmation.yaml", "qk_norm.yaml", "hessian.yaml"}
    assert names == full | {f"small/{name}" for name in small}
