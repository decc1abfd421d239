# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch under a real Slurm: saved, queued again and continued, and the run that nobody disturbed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from hosts import Hosts, missing
from launch import REPOSITORY, assert_same_run, losses
from recipe import VARIABLES, write_recipe

LACKING = missing() or slurm.missing()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]

STEPS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like the repository's folder, with a recipe and its data in it."""
    path = tmp_path_factory.mktemp("slurm")
    write_recipe(path, steps=STEPS)
    for name in ("launch", "configs", "pretrain_gpt.py"):
        (path / name).symlink_to(REPOSITORY / name)
    return path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[slurm.Slurm]:
    with slurm.Slurm(tmp_path_factory.mktemp("state"), hosts) as running:
        yield running


def submit(cluster: slurm.Slurm, folder: Path, save: str, *arguments: str) -> str:
    """Its job's number."""
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={save}.log"]
    job = ["launch/slurm.sbatch", "recipe.yaml", "--save", save, "--load", save, *arguments]
    return cluster.run(*sbatch, *job, folder=folder, env=os.environ | VARIABLES).strip()


def wait_for_step(folder: Path, save: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(losses(folder / save), default=0) < step:
        assert time.monotonic() < deadline, (folder / f"{save}.log").read_text()
        time.sleep(0.1)


def test_queued_again_and_continued(cluster: slurm.Slurm, hosts: Hosts, folder: Path) -> None:
    """SIGUSR1, as ahead of the time limit; a requeue, as by preemption; a killed rank: the same bits as undisturbed."""
    job = submit(cluster, folder, "disturbed")
    wait_for_step(folder, "disturbed", 5)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_step(folder, "disturbed", 100)
    cluster.run("scontrol", "requeue", job)
    wait_for_step(folder, "disturbed", 170)
    hosts.processes(1, "pretrain_gpt.py", "python -u")[-1].kill()
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    log = (folder / "disturbed.log").read_text()
    assert "SIGUSR1: stopped after step" in log and "SIGTERM: stopped after step" in log
    assert "ended with status 137; queued again, restart 3 of 10" in log
    assert log.count("continuing from step") == 3 and log.count("2 hosts, 15 checks: all well") == 4

    job = submit(cluster, folder, "undisturbed")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", (folder / "undisturbed.log").read_text()
    assert len(losses(folder / "undisturbed")) == STEPS
    assert_same_run(folder / "disturbed", folder / "undisturbed")


def test_an_error_is_not_tried_again(cluster: slurm.Slurm, folder: Path) -> None:
    """The preflight's table is in the log, and the job has failed."""
    job = submit(cluster, folder, "wrong", "--set", "data.prefix=elsewhere")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "FAILED"
    log = (folder / "wrong.log").read_text()
    assert "h1    data   elsewhere.json: no prepared data" in log and "2 of these would stop the run" in log
    assert not (folder / "wrong").exists()
