# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/ where nothing is started: shellcheck, --help, plain errors, and signals to a process group."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
STARTED = [name for name in SCRIPTS if name != "common.sh"]
BIN = Path(sys.executable).parent


def run(*command: str, folder: Path = REPOSITORY, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {"PATH": f"{BIN}:/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True, timeout=60)


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) == 6
    finished = run(str(BIN / "shellcheck"), "--external-sources", *(f"launch/{name}" for name in SCRIPTS))
    assert (finished.returncode, finished.stdout) == (0, "")


@pytest.mark.parametrize("name", STARTED)
def test_help_and_plain_errors(name: str, tmp_path: Path) -> None:
    script = ["bash", str(LAUNCH / name)] if name.endswith(".sbatch") else [str(LAUNCH / name)]
    shown = run(*script, "--help")
    assert shown.returncode == 0 and "RECIPE" in shown.stdout and not shown.stderr
    assert "set -e" not in shown.stdout and "#" not in shown.stdout
    for arguments, says in (
        ([], "error: which recipe?"),
        (["nope"], "error: nope: no such recipe; give a YAML, or one of configs/: gpt2_large_8k.yaml "),
    ):
        refused = run(*script, *arguments)
        assert refused.returncode == 1 and refused.stderr.startswith(says) and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["multinode.sh", "quickstart"], "which hosts? --hostfile FILE, with a line like: node1 slots=8"),
        (["multinode.sh", "quickstart", "--hostfile"], "--hostfile needs a value; --help tells more"),
        (["multinode.sh", "quickstart", "--hostfile", "none"], "none: no such hostfile; write one"),
        (["nossh.sh", "quickstart", "--nodes", "2"], "--node-rank --master-addr --ranks-per-node: needed as well"),
        (
            ["torchrun.sh", "quickstart", "--set", "a.b=1", "--nodes", "2"],
            "--ranks-per-node --master-addr: needed as well",
        ),
        (["slurm.sbatch", "quickstart"], "hand it to sbatch; --help shows how"),
    ],
)
def test_what_is_missing_is_named(command: list[str], says: str) -> None:
    refused = run("bash", str(LAUNCH / command[0]), *command[1:])
    assert refused.returncode == 1 and refused.stderr.startswith(f"error: {says}")


@pytest.mark.parametrize(
    ("script", "own", "expected"),
    [
        ("local.sh", ["--ranks", "3", "--master-port=7"], "deepspeed --num_gpus 3 --master_port 7 PRETRAIN --config"),
        (
            "torchrun.sh",
            ["--nodes", "1:2", "--ranks-per-node=4", "--master-addr", "h0", "--local-addr", "h1.ib"],
            "torchrun --nnodes 1:2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint h0:29400 "
            "--local-addr h1.ib --rdzv-id quickstart PRETRAIN --config",
        ),
    ],
)
def test_a_script_s_own_options_may_stand_anywhere(script: str, own: list[str], expected: str, tmp_path: Path) -> None:
    """What starts the ranks only shows its arguments; the recipe's run.save is left to the trainer."""
    for name in ("deepspeed", "torchrun", "python"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "${0##*/}" = python ] || echo "${0##*/} $*"\n')
        (tmp_path / name).chmod(0o755)
    arguments = ["--set", "run.seed=7", *own, "--keep", "1"]
    finished = run("bash", str(LAUNCH / script), "quickstart", *arguments, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert finished.stderr == ""
    recipe = f"{REPOSITORY}/configs/quickstart.yaml --default-save runs/quickstart --resume --set run.seed=7 --keep 1\n"
    assert finished.stdout == f"{expected} {recipe}".replace("PRETRAIN", f"{REPOSITORY}/pretrain_gpt.py")


def test_a_missing_environment_is_named() -> None:
    refused = run("/bin/bash", str(LAUNCH / "local.sh"), "quickstart", PATH="/usr/bin:/bin")
    assert refused.stderr == "error: deepspeed is not on the PATH: install it, or activate the environment it is in\n"


RANK = """
import signal, sys, time
def save(signum, frame):
    time.sleep(1.5)  # the checkpoint
    print("saved", signum, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_reaches_every_rank_and_their_saving_is_waited_for(signum: signal.Signals, tmp_path: Path) -> None:
    """The launcher between, like deepspeed's, dies of the signal at once."""
    (tmp_path / "rank.py").write_text(RANK)
    launcher = f"trap - INT; {sys.executable} {tmp_path}/rank.py & wait"
    script = f'set -euo pipefail; source {LAUNCH}/common.sh; run_group bash -c "{launcher}"; exit 0'
    process = subprocess.Popen(
        ["bash", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in the background inherit that SIGINT is ignored, and bash lets nobody trap what was ignored before it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    started = time.monotonic()
    assert process.wait(timeout=30) == 128 + signum and time.monotonic() - started > 1
    assert process.stdout.read() == f"saved {int(signum)}\n"


def test_a_group_s_status_is_its_command_s() -> None:
    script = f"source {LAUNCH}/common.sh; run_group bash -c 'exit {{}}'"
    assert [run("bash", "-c", script.format(status)).returncode for status in (0, 3)] == [0, 3]


UNREAPED = """
import ctypes, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: nobody waits for an orphan
sys.exit(subprocess.run(sys.argv[1:], timeout=20).returncode)
"""


def test_a_group_has_ended_where_only_a_zombie_is_left() -> None:
    """In a container whose first process reaps nobody; the orphan is waited for as long as it runs."""
    script = f"source {LAUNCH}/common.sh; run_group bash -c '(sleep 1.5; echo saved) & exit 3'"
    started = time.monotonic()
    finished = run(sys.executable, "-c", UNREAPED, "bash", "-c", script)
    assert (finished.returncode, finished.stdout) == (3, "saved\n"), finished.stderr
    assert time.monotonic() - started > 1.5


STAND_INS = {
    "srun": """
case "$*" in
*preflight.facts*) echo "$MEETING" >>meetings; [ "$SLOW" != preflight ] || exec sleep 12; exit "$PREFLIGHT" ;;
*) echo "$MASTER_ADDR" >>addresses; [ "$SLOW" != train ] || exec sleep 12; exit "$TRAIN" ;;
esac""",
    "scontrol": 'case "$1" in hostnames) ;; requeue) echo requeue ;; *) echo h0 ;; esac',
    "python": "cat >/dev/null",
}


@pytest.fixture
def slurm_job(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """launch/slurm.sbatch with stand-ins for Slurm and Python: what it makes of their statuses."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(
        preflight: int = 0, train: int = 0, *arguments: str, restarts: int = 0, slow: str = ""
    ) -> "subprocess.Popen[str]":
        numbers = {"JOB_ID": 7, "NTASKS_PER_NODE": 1, "NNODES": 1, "JOB_NODELIST": "h0", "RESTART_COUNT": restarts}
        variables = {f"SLURM_{name}": str(value) for name, value in numbers.items()}
        variables |= {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PREFLIGHT": str(preflight), "TRAIN": str(train)}
        command = ["bash", "launch/slurm.sbatch", "quickstart", *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env=variables | {"SLOW": slow}, stdout=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(
    ("preflight", "train", "restarts", "status", "again"),
    [
        (0, 0, 0, 0, False),
        (0, 1, 3, 1, False),  # an error that the run has explained
        (0, 70, 0, 70, True),
        (0, 137, 0, 137, True),
        (1, 0, 0, 1, False),
        (137, 0, 0, 1, False),
        (1, 0, 1, 1, True),  # it was well before
    ],
)
def test_a_slurm_job_that_fails_is_queued_again_where_that_may_help(
    slurm_job: Any, preflight: int, train: int, restarts: int, status: int, again: bool
) -> None:
    process = slurm_job(preflight, train, restarts=restarts)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "requeue" in output.split()) == (status, again), output
    assert ("restart 1 of 10" in output) == again


@pytest.mark.parametrize(
    ("arguments", "address"), [([], "h0"), (["--set", "run.seed=7", "--master-addr", "%h.cluster"], "h0.cluster")]
)
def test_a_slurm_job_s_first_node_may_have_another_name(
    slurm_job: Any, tmp_path: Path, arguments: list[str], address: str
) -> None:
    assert slurm_job(0, 0, *arguments).wait(timeout=60) == 0
    assert (tmp_path / "addresses").read_text() == f"{address}\n"


def test_a_slurm_job_s_failures_are_counted_from_its_newest_checkpoint(slurm_job: Any, tmp_path: Path) -> None:
    """In the run's folder, and not once more when all is well."""
    folder = tmp_path / "runs" / "quickstart"

    def failed(*statuses: int) -> str:
        return str(slurm_job(*statuses).communicate(timeout=60)[0])

    assert "restart 1 of 10" in failed(0, 137) and "restart 2 of 10" in failed(0, 137)
    (folder / "latest").write_text("global_step9")
    assert "restart 1 of 10" in failed(0, 137)
    (folder / ".failures-7").write_text("10 global_step9\n")
    assert failed(0, 137) == "" and list(folder.iterdir()) == [folder / "latest"]
    assert "restart 1 of 10" in failed(0, 137) and failed(0, 0) == ""
    assert list(folder.iterdir()) == [folder / "latest"]
    numbers = (tmp_path / "meetings").read_text().split()
    assert len(numbers) == 6 == len(set(numbers)) and all(len(number) == 16 for number in numbers)


@pytest.mark.parametrize("slow", ["preflight", "train"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_slurm_job_s_signals(slurm_job: Any, tmp_path: Path, slow: str, signum: signal.Signals) -> None:
    """Ahead of its time limit it is queued again, and that is no failure; cancelled or preempted that is Slurm's."""
    process = slurm_job(slow=slow)
    deadline = time.monotonic() + 30
    while not (tmp_path / "meetings").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    output = process.stdout.readline()  # the stand-in of a preflight may outlive it, as Slurm's own would not
    assert process.wait(timeout=20) != 0
    assert ("the time limit is near" in output) == (signum == signal.SIGUSR1)
    assert not (tmp_path / "runs").exists()
