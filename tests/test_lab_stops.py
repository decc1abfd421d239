# SPDX-License-Identifier: Apache-2.0
"""The laboratory with the real trainer: stopped in every way, and failed by the machine."""

import signal
import subprocess

import psutil
import pytest
from lab_case import attempts, command, environment, lab, results, wait_for, write_studies
from launch import losses

from merit_ds.lab.attempts import is_locked


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
