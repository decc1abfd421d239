# SPDX-License-Identifier: Apache-2.0
"""The laboratory with the real trainer: stopped in every way, and failed by the machine."""

import json
import os
import signal
import subprocess

import psutil
import pytest
from lab_case import attempts, command, environment, lab, results, wait_for, write_studies
from launch import REPOSITORY, losses

from merit_ds.lab.attempts import is_locked, try_lock
from merit_ds.lab.laboratory import Laboratory
from merit_ds.lab.progress import summary
from merit_ds.lab.study import load_study
from merit_ds.lab.trainer_process import Machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_studies(tmp_path_factory.mktemp("lab"))


def test_a_study_that_is_stopped_or_killed_goes_on_and_comes_to_the_same_end(folder):
    """By a signal to the lab; by kill -9 of the lab, whose trainer goes on; by kill -9 of a trainer."""
    whole = lab(folder, "long", "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    (id_,) = results(folder / "whole")
    run = folder / "cut" / "runs" / id_

    def start():
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command("long", "cut"), cwd=folder, text=True, stdout=pipe, stderr=pipe, env=environment()
        )

    def last():
        return max(losses(run), default=0)

    def checkpoint():
        return int((run / "latest").read_text().removeprefix("global_step")) if (run / "latest").exists() else 0

    first = start()
    wait_for(lambda: last() > 12, first)
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=100)[0]
    assert first.returncode == 1 and "run the same command to go on" in printed
    stopped = checkpoint()
    assert 12 < stopped < 160 and not (run / "result.json").exists() and not is_locked(run)

    second = start()
    wait_for(lambda: checkpoint() > stopped + 10, second)
    second.kill()
    second.communicate()
    assert is_locked(run)
    third = start()  # finds the run taken by the trainer of the second, and waits for it
    at = checkpoint()
    wait_for(lambda: checkpoint() > at, third)
    assert attempts(run) == 2
    kill_trainer(run)
    wait_for(lambda: attempts(run) == 3 and checkpoint() > at + 10, third)
    kill_trainer(run)
    printed = third.communicate(timeout=100)[0]
    assert third.returncode == 1 and f"stopped   {id_} by SIGKILL" in printed and not (run / "result.json").exists()

    last_part = lab(folder, "long", "cut")
    assert last_part.returncode == 0, last_part.stdout + last_part.stderr
    assert attempts(run) == 4 and (run / "log.txt").read_text().count("continuing from step") == 3
    assert losses(run) == losses(folder / "whole" / "runs" / id_)
    ours, reference = results(folder / "cut")[id_], results(folder / "whole")[id_]
    for key in ("final_valid_loss", "best_valid_loss", "initial_valid_loss", "steps", "status"):
        assert ours[key] == reference[key]


def kill_trainer(run):
    (trainer,) = [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(run) and "recipe.yaml" in process.info["cmdline"]
    ]
    trainer.kill()


def test_a_stop_during_a_build_leaves_no_lock_on_which_every_later_run_fails(folder, tmp_path):
    """DeepSpeed's communication op is being compiled, for the first time, when the lab is stopped."""
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command("long", "build"), cwd=folder, env=variables, text=True, stdout=pipe, stderr=pipe)
    wait_for(lambda: list(tmp_path.glob("*/lock")), process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "stopped   MERIT-b8-lr0.02-s1 by SIGTERM" in printed
    assert list(tmp_path.glob("*/build.ninja")) and not list(tmp_path.glob("*/lock"))


def test_runs_that_the_machine_fails_are_no_results(folder, tmp_path):
    """The corpus loses its end after it was prepared: not a word about any optimizer."""
    for path in folder.glob("data*"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:-2] if path.name == "data_train.bin" else content)
    broken = lab(folder, "broken", "broken", "--jobs", "2", data=str(tmp_path / "data"))
    assert broken.returncode == 1 and "taken back: " in broken.stdout, broken.stdout
    assert broken.stdout.count("corpus_train.bin: ") >= 3
    assert not list((folder / "broken").rglob("result.json")) and not results(folder / "broken")


FAULTY = """
import errno, json, os, runpy, signal, sys
from pathlib import Path
from merit_ds.errors import TransientError
from merit_ds.training.cli import report_errors

fault = json.loads(Path(__file__).with_name("faults.json").read_text()).get(Path.cwd().name)
if fault == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
with report_errors():
    if fault:
        raise TransientError(fault)
runpy.run_path(os.environ["REAL_TRAINER"], run_name="__main__")
"""


@pytest.fixture
def faulty(folder, monkeypatch):
    """The laboratory with the real trainer, of which some runs meet a fault of the machine first."""
    (folder / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("REAL_TRAINER", str(REPOSITORY / "pretrain_gpt.py"))

    def run(output, faults, *arguments):
        (folder / "faults.json").write_text(json.dumps(faults))
        return lab(folder, "pair", output, "--script", "faulty.py", *arguments)

    return run


def test_a_run_that_asks_to_be_tried_again_decides_nothing(folder, faulty):
    """A full disk at one seed: a result would leave it out for good; so it has none, and the next command goes on."""
    first = faulty("again", {"MERIT-b8-lr0.02-s1": "runs: no space left"})
    assert first.returncode == 1
    assert "stopped   MERIT-b8-lr0.02-s1 for now: runs: no space left; run the same command to go on" in first.stdout
    assert list(results(folder / "again")) == ["MERIT-b8-lr0.02-s2"]
    second = faulty("again", {})
    assert second.returncode == 0, second.stdout + second.stderr
    assert [row["status"] for row in results(folder / "again").values()] == ["done", "done"]


def test_a_run_that_is_killed_again_and_again_has_failed(folder, faulty):
    """As by a host out of memory: without a result, what waits for it would wait for ever."""
    id_, faults = "MERIT-b8-lr0.02-s1", {"MERIT-b8-lr0.02-s1": "killed"}
    for _ in range(2):
        killed = faulty("killed", faults, "--only", id_)
        assert killed.returncode == 1 and f"stopped   {id_} by SIGKILL; run the same" in killed.stdout, killed.stdout
        assert not list((folder / "killed").rglob("result.json"))
    faulty("killed", faults, "--only", id_)
    (row,) = results(folder / "killed").values()
    assert row["status"] == "failed"
    assert row["reason"].startswith("SIGKILL, 3 times without a checkpoint between; out of memory?")
    retried = faulty("killed", faults, "--only", id_, "--retry-failed")
    assert "by SIGKILL; run the same" in retried.stdout and not results(folder / "killed")
    assert faulty("killed", {}, "--only", id_).returncode == 0


def test_runs_of_other_processes_are_told_from_those_to_do_also_while_all_places_are_full(folder, tmp_path):
    study = load_study(folder / "pair.yaml")
    states = []
    machine = Machine(REPOSITORY / "pretrain_gpt.py", jobs=1, ranks=1, threads=1, gpus=())
    laboratory = Laboratory(
        study, source=folder, output=tmp_path, machine=machine, data={}, only=[], tell=print, show=states.append
    )
    others = [try_lock(tmp_path / "runs" / plan.point.id) for plan in laboratory.state.todo[1:]]
    laboratory.state.todo.reverse()
    for _ in range(2):
        laboratory._start()
        assert len(laboratory.state.running) == 1
        assert len(laboratory.state.elsewhere) == len(others) == 1
        assert ", 0 to do, 1 in another process" in summary(laboratory.state, machine)
    (process,) = laboratory.state.running
    process.stop()
    process._process.wait()
    process.release()
    for lock in others:
        os.close(lock)
