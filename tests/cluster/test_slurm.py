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

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like the repository's folder, with a recipe and its data in it."""
    path = tmp_path_factory.mktemp("slurm")
    write_recipe(path, steps=STEPS)
    for name in ("launch", "configs", "pretrain_gpt.py"):
        (path / name).symlink_to(REPOSITORY / name)
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    state = tmp_path_factory.mktemp("state")
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as hosts, slurm.Slurm(state, hosts) as running:
        yield running


def submit(cluster: slurm.Slurm, folder: Path, save: str, *options: str) -> str:
    """Its job's number."""
    resources = [
        "--nodes",
        "2",
        "--ntasks-per-node",
        "1",
        f"--chdir={folder}",
        f"--output={folder}/{save}.log",
        *options,
    ]
    command = ["sbatch", "--parsable", *resources, str(folder / "launch/slurm.sbatch"), "recipe.yaml"]
    variables = os.environ | VARIABLES
    return cluster.run(*command, "--save", save, "--load", save, folder=folder, env=variables).strip()


def wait_for_step(folder: Path, save: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(losses(folder / save), default=0) < step:
        assert time.monotonic() < deadline, (folder / f"{save}.log").read_text()
        time.sleep(0.1)


def test_queued_again_and_continued(cluster: slurm.Slurm, folder: Path) -> None:
    """SIGUSR1, as ahead of the time limit, and a requeue, as by preemption: two nodes, the same bits as undisturbed."""
    job = submit(cluster, folder, "disturbed")
    wait_for_step(folder, "disturbed", 5)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_step(folder, "disturbed", 20)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    log = (folder / "disturbed.log").read_text()
    assert "SIGUSR1: stopped after step" in log and "SIGTERM: stopped after step" in log
    assert log.count("continuing from step") == 2 and log.count("2 hosts, 15 checks: all well") == 3

    job = submit(cluster, folder, "undisturbed")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", (folder / "undisturbed.log").read_text()
    assert len(losses(folder / "undisturbed")) == STEPS
    assert_same_run(folder / "disturbed", folder / "undisturbed")


def test_an_error_is_not_tried_again(cluster: slurm.Slurm, folder: Path) -> None:
    """The preflight's table is in the log, and the job has failed."""
    job = submit(cluster, folder, "wrong", "--ntasks-per-node", "3")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "FAILED"
    log = (folder / "wrong.log").read_text()
    assert "train_batch_size 8 is no multiple of" in log and "1 of these would stop the run" in log
    assert not (folder / "wrong").exists()
