# SPDX-License-Identifier: Apache-2.0
"""Signals, locks, ranks, GPUs and Slurm: what the laboratory makes of the machine that it is on."""

import errno
import os
import signal
import time
from dataclasses import replace

import pytest
from tiny_study import loader

from merit_ds.errors import InputError
from merit_ds.lab.attempts import begin_attempt, exclusive, try_lock
from merit_ds.lab.laboratory import Laboratory
from merit_ds.lab.points import expand
from merit_ds.lab.recipe import check_plan, plan_run, write_plan
from merit_ds.lab.result import judge
from merit_ds.lab.slurm import resources
from merit_ds.lab.trainer_process import Machine, TrainerProcess, share_machine, signal_of


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


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
    with pytest.raises(InputError, match=r"run: interrupted with --ranks 1, .* give --ranks 1, or remove the folder"):
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
