# SPDX-License-Identifier: Apache-2.0
"""One run as a process: the real trainer, in the run's folder, with its output in log.txt."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from merit_ds.errors import InputError
from merit_ds.lab.attempts import begin_attempt, end_attempt
from merit_ds.lab.recipe import RECIPE, RunPlan
from merit_ds.lab.result import LOG, last_iteration
from merit_ds.training.cli import TRY_AGAIN

FAULTS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
"""Signals that a process brings on itself: done again, it would crash again."""


@dataclass(frozen=True)
class Machine:
    """How this machine is shared among runs that go on at the same time.

    Attributes:
        script: the trainer, absolute.
        jobs: runs at the same time.
        ranks: of each run.
        threads: CPU threads of each rank.
        gpus: this process's devices, by the names that CUDA_VISIBLE_DEVICES takes; empty: the runs are on the CPU.
    """

    script: Path
    jobs: int
    ranks: int
    threads: int
    gpus: Sequence[str]

    @property
    def cores(self) -> int:
        """CPU cores of one run."""
        return self.threads * self.ranks


def share_machine(
    script: Path, *, jobs: int | None, ranks: int, starts: bool = True, need_gpus: bool = False
) -> Machine:
    """Divide cores and GPUs. Without `jobs`: as many as GPUs allow, or one on the CPU.

    Runs of one rank may share a GPU, which a small model does not fill; ranks of one run must each have their own.

    Args:
        starts: whether runs are started here; a cluster's login node need not have their GPUs.
        need_gpus: refuse to go on without a GPU.

    Raises:
        InputError: no trainer at `script`, or more GPUs are asked for than there are.
    """
    if not script.is_file():
        raise InputError(f"{script}: no trainer there; run in the project's folder, or give --script pretrain_gpt.py")
    gpus = _visible_gpus()
    if need_gpus and not gpus:
        raise InputError(
            "--need-gpus: no GPU is visible here; ask for them with --sbatch, check the node's driver, or submit with "
            "DS_ACCELERATOR=cpu for runs on the CPU"
        )
    if starts and gpus and ranks > 1 and len(gpus) < ranks * (jobs or 1):
        raise InputError(
            f"{jobs or 1} jobs of {ranks} ranks need as many GPUs, but there are {len(gpus)}; lower --jobs"
        )
    jobs = jobs or max(1, len(gpus) // ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))
    return Machine(script.resolve(), jobs, ranks, threads, gpus)


class TrainerProcess:
    """A trainer that has been started, and the lock of its run, which it holds as well.

    Attributes:
        started: time.monotonic() then.
        begun_at: the step from which it goes on, or one soon after.
    """

    def __init__(self, plan: RunPlan, folder: Path, *, lock: int, slot: int, machine: Machine) -> None:
        """Args: lock: from `try_lock`; slot: which of the machine's jobs this is, from 0."""
        self.plan, self.folder, self.slot = plan, folder, slot
        self.started = time.monotonic()
        self.begun_at = last_iteration(folder)
        self._lock = lock
        self._deadline: float | None = None
        port = _free_port()
        environment = os.environ | {"OMP_NUM_THREADS": str(machine.threads), "MASTER_PORT": str(port)}
        if machine.gpus:
            first = slot * machine.ranks
            mine = [machine.gpus[number % len(machine.gpus)] for number in range(first, first + machine.ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        begin_attempt(folder, log=folder / LOG, ranks=machine.ranks)
        with (folder / LOG).open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C in the terminal reaches the lab alone, which signals the whole group.
            self._process = subprocess.Popen(
                _command(machine, port),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )

    def ended(self) -> bool:
        """Whether the trainer and, under DeepSpeed's launcher, every rank has ended."""
        if self._process.poll() is None:
            return False
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        # The launcher may end before its ranks, which still save. Nobody may be there to bury them, so not for ever.
        self._deadline = self._deadline or time.monotonic() + 120
        return time.monotonic() > self._deadline

    @property
    def killed(self) -> str | None:
        """The signal that ended it from outside, if one did."""
        name = signal_of(self._process.returncode)
        return None if name in FAULTS else name

    @property
    def crashed(self) -> str | None:
        """The signal by which it ended through its own fault, if one did."""
        name = signal_of(self._process.returncode)
        return name if name in FAULTS else None

    @property
    def succeeded(self) -> bool:
        """Whether it says itself that all went well: it is done, or was asked to stop."""
        return self._process.returncode == 0

    @property
    def asks_again(self) -> bool:
        """Whether it ended by what a later try may cure, such as a full disk."""
        return self._process.returncode == TRY_AGAIN

    @property
    def port_taken(self) -> bool:
        """Whether it ended because another process took its port between the choice and the start."""
        text = (self.folder / LOG).read_bytes()[self._log_start :]
        return not self.succeeded and b"EADDRINUSE" in text

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def note_end(self) -> None:
        """Note when and how it ended, for its run's seconds and for what is known of its kills."""
        end_attempt(self.folder, log=self.folder / LOG, killed=self.killed)

    def release(self) -> None:
        """Give its run free."""
        os.close(self._lock)


def signal_of(code: int) -> str | None:
    """The name of the signal that an exit code tells of.

    Python gives -n for the process itself, a shell 128 + n, and DeepSpeed's launcher exits with a rank's -n: 256 - n.
    255 is also what a program gives that exits with -1, so it is no signal.
    """
    number = -code if code < 0 else 256 - code if 192 < code < 255 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None


def _command(machine: Machine, port: int) -> list[str]:
    script = [str(machine.script), "--config", RECIPE]
    if machine.ranks == 1:
        return [sys.executable, "-u", *script]
    # On GPUs the launcher starts a rank for each visible device.
    count = [] if machine.gpus else ["--num_gpus", str(machine.ranks)]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), *count, "--master_port", str(port), *script]


def cpu_is_asked_for() -> bool:
    """Whether the environment keeps DeepSpeed, and so the trainer, on the CPU."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def _visible_gpus() -> list[str]:
    if cpu_is_asked_for() or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
