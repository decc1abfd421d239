# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/ on real hosts: the same run, bit for bit, by every way; and what is wrong, in a table."""

import os
import subprocess
from pathlib import Path

import job
import pytest
from hosts import SSH_PORT, Hosts
from launch import REPOSITORY, assert_same_run, losses

from merit_ds.preflight.sizes import checkpoint_bytes
from merit_ds.training.config import load_config

STEPS = 4
VARIABLES = os.environ | job.VARIABLES


@pytest.fixture(scope="module")
def here(folder: Path, hosts: Hosts) -> Path:
    """The run of two ranks on one host."""
    job.write_recipe(folder, steps=STEPS, batch=8, micro_batch=2)
    finished = on(hosts, folder, "local.sh", "--ranks", "2", save="here")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(losses(folder / "here")) == STEPS
    return folder / "here"


def command(name: str, *arguments: str, save: str) -> list[str]:
    return [str(REPOSITORY / "launch" / name), "recipe.yaml", *arguments, "--save", save, "--load", save]


def on(hosts: Hosts, folder: Path, *arguments: str, save: str) -> "subprocess.CompletedProcess[str]":
    """Run a script on the first host."""
    return hosts.run(0, *command(*arguments, save=save), cwd=folder, env=VARIABLES, timeout=400)


def on_each(hosts: Hosts, folder: Path, *commands: list[str]) -> None:
    """Run a command on each of the first hosts at once, to success."""
    started = [hosts.start(host, *argv, cwd=folder, env=VARIABLES) for host, argv in enumerate(commands)]
    outputs = [job.finish(process, within=400) for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(outputs)


def multinode(hosts: Hosts, folder: Path, *names: str, save: str) -> "subprocess.CompletedProcess[str]":
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    return on(hosts, folder, "multinode.sh", "--hostfile", "hosts", "--ssh-port", str(SSH_PORT), save=save)


def test_pdsh(hosts: Hosts, folder: Path, here: Path) -> None:
    finished = multinode(hosts, folder, "h0", "h1", save="pdsh")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "preflight: 2 hosts, 15 checks: all well" in finished.stdout
    assert_same_run(folder / "pdsh", here)
    # The same command again: nothing is left to do.
    finished = multinode(hosts, folder, "h0", "h1", save="pdsh")
    assert finished.returncode == 0 and f"continuing from step {STEPS}" in finished.stdout
    assert_same_run(folder / "pdsh", here)


def test_no_ssh(hosts: Hosts, folder: Path, here: Path) -> None:
    common = ["--nodes", "2", "--master-addr", "h0", "--ranks-per-node", "1"]
    ranks = (command("nossh.sh", "--node-rank", str(rank), *common, save="nossh") for rank in range(2))
    on_each(hosts, folder, *ranks)
    assert_same_run(folder / "nossh", here)


def test_torchrun(hosts: Hosts, folder: Path, here: Path) -> None:
    common = ["--nodes", "2", "--master-addr", "h0", "--ranks-per-node", "1"]
    on_each(hosts, folder, *[command("torchrun.sh", *common, save="torchrun")] * 2)
    assert_same_run(folder / "torchrun", here)


def test_a_checkpoint_takes_what_the_preflight_thinks(folder: Path, here: Path) -> None:
    size = sum(path.stat().st_size for path in (here / f"global_step{STEPS}").rglob("*") if path.is_file())
    assert 0.95 < size / checkpoint_bytes(load_config(folder / "recipe.yaml"), vocab_size=256) < 1.05


def test_what_is_wrong_is_in_a_table(hosts: Hosts, folder: Path, here: Path) -> None:
    """A host that does not answer, one with another recipe, a folder that is not shared; and nothing is started."""
    recipe, unshared, other = folder / "recipe.json", folder / "unshared", folder / "other.json"
    unshared.mkdir()
    other.write_text(recipe.read_text().replace('"stage": 2', '"stage": 1'))
    hosts.run(1, "mount", "--bind", str(other), str(recipe), check=True)
    hosts.run(1, "mount", "-t", "tmpfs", "tmpfs", str(unshared), check=True)
    try:
        finished = multinode(hosts, folder, "h0", "h1", "h7", save="unshared")
    finally:
        hosts.run(1, "umount", str(recipe), str(unshared), check=True)
    rows = [line.split(maxsplit=2) for line in finished.stdout.splitlines() if line[:3] in ("all", "h0 ", "h1 ", "h7 ")]
    assert [row[:2] for row in rows] == [["all", "batch"], ["h1", "recipe"], ["h1", "run.save"], ["h7", "reachable"]]
    assert "the nearest that fit: train_batch_size 6 or 12" in rows[0][2]
    assert rows[1][2] == "recipe.json: not the file that h0 has; copy it there"
    assert rows[2][2].startswith("unshared is not the first host's")
    assert rows[3][2].startswith("ssh: ") and "h7" in rows[3][2]
    assert finished.returncode == 1 and finished.stdout.endswith("preflight: 4 of these would stop the run\n")
    assert list(unshared.iterdir()) == [] and not hosts.processes(1, "deepspeed.launcher")


def test_torchrun_restarts_what_a_killed_rank_has_ended(hosts: Hosts, folder: Path) -> None:
    """By itself, from the newest checkpoint, to the end of the run that nobody disturbed."""
    job.write_recipe(folder, steps=24, batch=4, micro_batch=2, save_interval=4, timeout=60)
    finished = on(hosts, folder, "local.sh", "--ranks", "2", save="calm")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    argv = command("torchrun.sh", "--nodes", "2", "--ranks-per-node", "1", "--master-addr", "h0", save="killed")
    nodes = [hosts.start(host, *argv, cwd=folder, env=VARIABLES) for host in (0, 1)]
    job.wait_for_step(nodes[0], folder / "killed", 6)
    victim = next(p for p in hosts.processes(1, "pretrain_gpt.py") if "LOCAL_RANK" in p.environ())
    victim.kill()
    outputs = [job.finish(process, within=400) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], "\n".join(outputs)
    named = [line for output in outputs for line in job.errors(output)]
    assert len(named) == 1 and " on h1 was killed or crashed while " in named[0], named
    assert "continuing from step " in "".join(outputs)
    assert_same_run(folder / "killed", folder / "calm")


def test_torchrun_goes_on_with_the_hosts_that_are_left(hosts: Hosts, folder: Path) -> None:
    """A host crashes for good: by itself, with fewer ranks and the same batch."""
    job.write_recipe(folder, steps=24, batch=4, micro_batch=2, save_interval=4, timeout=20)
    argv = command("torchrun.sh", "--nodes", "1:2", "--ranks-per-node", "1", "--master-addr", "h0", save="fewer")
    first, _ = [hosts.start(host, *argv, cwd=folder, env=VARIABLES) for host in (0, 1)]
    job.wait_for_step(first, folder / "fewer", 6)
    hosts.crash(1)
    output = job.finish(first, within=400)
    hosts.boot(1)
    assert first.returncode == 0, output
    assert "continuing from step " in output and "ranks before: 2, now: 1; train_batch_size stays 4" in output
    assert sorted(losses(folder / "fewer")) == list(range(1, 25))
