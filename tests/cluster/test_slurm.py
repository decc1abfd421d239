# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch under a real Slurm: saved, queued again and continued, and the run that nobody disturbed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import job
import pytest
import slurm
from hosts import Hosts
from launch import REPOSITORY, assert_same_run, losses

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))

STEPS = 300


@pytest.fixture(scope="module")
def submitted_from(folder: Path) -> Path:
    """What looks like the repository's folder, with a recipe and its data in it."""
    job.write_recipe(folder, steps=STEPS, batch=8, micro_batch=4, save_interval=30)
    for name in ("launch", "configs", "pretrain_gpt.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[slurm.Slurm]:
    with slurm.Slurm(tmp_path_factory.mktemp("slurm"), hosts) as running:
        yield running


def submit(cluster: slurm.Slurm, folder: Path, save: str, *arguments: str) -> str:
    """Its job's number."""
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={save}.log"]
    trainer = ["recipe.yaml", "--save", save, "--load", save, *arguments]
    environment = os.environ | job.VARIABLES
    return cluster.run(*sbatch, "launch/slurm.sbatch", *trainer, cwd=folder, env=environment).strip()


def wait_for_step(folder: Path, save: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(losses(folder / save), default=0) < step:
        assert time.monotonic() < deadline, (folder / f"{save}.log").read_text()[-3000:]
        time.sleep(0.1)


def test_queued_again_and_continued(cluster: slurm.Slurm, hosts: Hosts, submitted_from: Path) -> None:
    """SIGUSR1, as ahead of the time limit; a requeue, as by preemption; a killed rank: the same bits as undisturbed."""
    folder = submitted_from
    number = submit(cluster, folder, "disturbed")
    wait_for_step(folder, "disturbed", 5)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    wait_for_step(folder, "disturbed", 100)
    cluster.run("scontrol", "requeue", number)
    wait_for_step(folder, "disturbed", 170)
    (rank,) = [one for host in (1, 2) for one in hosts.processes(host, "python -u", "pretrain_gpt.py")]
    rank.kill()
    assert cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    log = (folder / "disturbed.log").read_text()
    assert "SIGUSR1: stopped after step" in log and "SIGTERM: stopped after step" in log
    assert "ended with status 137; queued again, restart 1 of 10" in log
    assert log.count("continuing from step") == 3 and log.count("2 hosts, 15 checks: all well") == 4

    number = submit(cluster, folder, "undisturbed")
    assert cluster.wait(number, "COMPLETED", "FAILED") == "COMPLETED"
    assert len(losses(folder / "undisturbed")) == STEPS
    assert_same_run(folder / "disturbed", folder / "undisturbed")


def test_an_error_is_not_tried_again(cluster: slurm.Slurm, submitted_from: Path) -> None:
    """The preflight's table is in the log, and the job has failed."""
    number = submit(cluster, submitted_from, "wrong", "--set", "data.prefix=elsewhere")
    assert cluster.wait(number, "COMPLETED", "FAILED") == "FAILED"
    log = (submitted_from / "wrong.log").read_text()
    assert "h1    data   elsewhere.json: no prepared data" in log and "2 of these would stop the run" in log
    assert not (submitted_from / "wrong").exists()
