# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/ on real hosts: the same run, bit for bit, by every way; and what is wrong, in a table."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import SSH_PORT, Hosts, missing
from launch import REPOSITORY, assert_same_run, losses
from recipe import DEEPSPEED, VARIABLES, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its data and a .deepspeed_env, as every host sees them."""
    path = tmp_path_factory.mktemp("launch")
    write_recipe(path, steps=STEPS)
    return path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as running:
        yield running


@pytest.fixture(scope="module")
def here(folder: Path, hosts: Hosts) -> Path:
    """The run of two ranks on one host."""
    command = script(folder, "local.sh", "--ranks", "2", *saving("here"))
    finished = hosts.run(0, *command, env=variables(), timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(losses(folder / "here")) == STEPS
    return folder / "here"


def variables() -> dict[str, str]:
    return os.environ | VARIABLES


def script(folder: Path, name: str, *arguments: str) -> list[str]:
    """A command of launch/, in the folder: entering a host's mounts leaves the working folder."""
    return ["env", f"--chdir={folder}", str(REPOSITORY / "launch" / name), "recipe.yaml", *arguments]


def saving(name: str) -> list[str]:
    return ["--save", name, "--load", name]


def on_each(hosts: Hosts, *commands: list[str]) -> None:
    """Run a command on each host at once, to success."""
    started = [hosts.start(host, *command, env=variables()) for host, command in enumerate(commands)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(outputs)


def multinode(
    hosts: Hosts, folder: Path, *arguments: str, hostfile: Path | None = None
) -> subprocess.CompletedProcess[str]:
    given = ["--hostfile", str(hostfile or hosts.hostfile), "--ssh-port", str(SSH_PORT)]
    return hosts.run(0, *script(folder, "multinode.sh", *given, *arguments), env=variables(), timeout=300)


def test_pdsh(hosts: Hosts, folder: Path, here: Path) -> None:
    finished = multinode(hosts, folder, *saving("pdsh"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "preflight: 2 hosts, 15 checks: all well\n" in finished.stdout
    assert_same_run(folder / "pdsh", here)
    # The same command again: nothing is left to do.
    finished = multinode(hosts, folder, *saving("pdsh"))
    assert finished.returncode == 0 and f"continuing from step {STEPS}" in finished.stdout
    assert_same_run(folder / "pdsh", here)


def test_no_ssh(hosts: Hosts, folder: Path, here: Path) -> None:
    common = ["--nodes", "2", "--master-addr", "h0", "--ranks-per-node", "1", *saving("nossh")]
    on_each(hosts, *(script(folder, "nossh.sh", "--node-rank", str(rank), *common) for rank in range(2)))
    assert_same_run(folder / "nossh", here)


def test_torchrun(hosts: Hosts, folder: Path, here: Path) -> None:
    common = ["--nodes", "2", "--master-addr", "h0", "--ranks-per-node", "1", *saving("torchrun")]
    on_each(hosts, *[script(folder, "torchrun.sh", *common)] * 2)
    assert_same_run(folder / "torchrun", here)


def test_what_is_wrong_is_in_a_table(hosts: Hosts, folder: Path) -> None:
    """A host that does not answer, one with another recipe, a folder that is not shared; and nothing is started."""
    hostfile = folder / "three"
    hostfile.write_text(hosts.hostfile.read_text() + "h7 slots=1\n")
    (folder / "unshared").mkdir()
    (folder / "other.json").write_text(json.dumps(DEEPSPEED | {"gradient_clipping": 0.5}))
    hosts.run(1, "mount", "--bind", str(folder / "other.json"), str(folder / "recipe.json"), check=True)
    hosts.run(1, "mount", "-t", "tmpfs", "tmpfs", str(folder / "unshared"), check=True)
    try:
        finished = multinode(hosts, folder, *saving("unshared"), hostfile=hostfile)
    finally:
        hosts.run(1, "umount", str(folder / "recipe.json"), str(folder / "unshared"), check=True)
    rows = [line.split(maxsplit=2) for line in finished.stdout.splitlines() if line[:3] in ("all", "h0 ", "h1 ", "h7 ")]
    assert [row[:2] for row in rows] == [["all", "batch"], ["h1", "recipe"], ["h1", "run.save"], ["h7", "reachable"]]
    assert "the nearest that fit: train_batch_size 6 or 12" in rows[0][2]
    assert rows[1][2] == "recipe.json: not the file that h0 has; copy it there"
    assert rows[2][2].startswith("unshared is not the first host's")
    assert rows[3][2].startswith("ssh: ") and "h7" in rows[3][2]
    assert finished.returncode == 1 and finished.stdout.endswith("preflight: 4 of these would stop the run\n")
    assert list((folder / "unshared").iterdir()) == [] and not hosts.processes(1, "deepspeed.launcher")
