# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on the test hosts: munged and slurmd on each, slurmctld on the first."""

import shutil
import time
from pathlib import Path
from typing import Any

from hosts import Hosts

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
# Requeued jobs wait until their old credentials have expired: 2 minutes by default.
CONFIG = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=60
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What this machine lacks to run Slurm, in one line; None where nothing."""
    absent = [tool for tool in TOOLS if _path(tool) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else None


class Slurm:
    """Slurm on all of the hosts, from entering to leaving.

    Args:
        folder: for its state and logs; an empty one.
        hosts: entered already; the daemons end with them.
    """

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder = folder
        self._hosts = hosts
        self.config = folder / "slurm.conf"
        """For the environment's SLURM_CONF."""
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs=1 State=UNKNOWN"
            for name, address in zip(hosts.names, hosts.addresses, strict=True)
        ]
        first = f"{hosts.names[0]}({hosts.addresses[0]})"
        self.config.write_text(CONFIG.format(first=first, folder=folder, nodes="\n".join(nodes)))
        key = folder / "munge.key"
        key.write_bytes(bytes(range(128)))
        key.chmod(0o400)

    def __enter__(self) -> "Slurm":
        for host in range(len(self._hosts.names)):
            # The socket's path is fixed, and /run is shared.
            self._run(host, "mkdir", "-p", "/run/munge")
            self._run(host, "mount", "-t", "tmpfs", "tmpfs", "/run/munge")
            own = [f"--{what}-file={self.folder}/{what}-{host}" for what in ("pid", "log", "seed")]
            self._run(host, "munged", "--force", f"--key-file={self.folder}/munge.key", *own)
        self._run(0, "slurmctld", "-f", str(self.config))
        for host in range(len(self._hosts.names)):
            self._run(host, "slurmd", "-f", str(self.config))
        self._wait_for("idle", lambda: self.run("sinfo", "--noheader", "--format=%t").split() == ["idle"])
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--full", "--user=root")
        self.run("scontrol", "shutdown")

    def run(self, *command: str, **options: Any) -> str:
        """A command of Slurm on the first host, to success; options as `Hosts.run` has them. What it printed."""
        return self._run(0, "env", f"SLURM_CONF={self.config}", *command, **options)

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        """Until the job is in one of the states, which is returned."""
        self._wait_for(f"job {job} {states}", lambda: self.state(job) in states, seconds)
        return self.state(job)

    def _wait_for(self, what: str, ready: Any, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s; logs are in {self.folder}"
            time.sleep(0.5)

    def _run(self, host: int, tool: str, *arguments: str, **options: Any) -> str:
        finished = self._hosts.run(host, _path(tool) or tool, *arguments, **options)
        assert finished.returncode == 0, f"{tool} {arguments}: {finished.stdout}{finished.stderr}"
        return str(finished.stdout)


def _path(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin")
