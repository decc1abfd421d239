# SPDX-License-Identifier: Apache-2.0
"""Every host's facts against the recipe, the hostfile and one another.

Each check is a function of the job and the facts that yields what is wrong; CHECKS is the list of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from merit_ds.errors import InputError
from merit_ds.preflight.facts import Facts
from merit_ds.preflight.sizes import checkpoint_bytes, gigabytes
from merit_ds.training.config import Config
from merit_ds.training.cpu_comm import SHARED_BYTES
from merit_ds.training.deepspeed_config import read_deepspeed_json
from merit_ds.training.plan import plan_of

CLOCK_SECONDS = 5.0
"""Clocks that differ by more are worth a warning: logs do not line up, and munge, Slurm's, refuses beyond minutes."""
OPEN_FILES = 4096
GUARD_FILES = 100
"""What the guard of rank 0 has open besides a connection for each rank, with room."""
NCCL_SHM_BYTES = 2**30
"""NCCL's ranks of one host talk through /dev/shm; a container that was not told otherwise has 64 MiB."""


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes:
        slots: ranks of each host, by the hostfile's names and in its order.
        config: the recipe.
        fewest: hosts with which it may start, or go on after a loss; None: all.
    """

    slots: dict[str, int]
    config: Config
    fewest: int | None = None

    @property
    def world(self) -> int:
        """Ranks of all hosts."""
        return sum(self.slots.values())


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or, with `fatal` false, one to know."""

    host: str
    check: str
    text: str
    fatal: bool = True


Value = TypeVar("Value")
Check = Callable[[Job, dict[str, Facts]], Iterator[Finding]]


def judge(job: Job, facts: dict[str, Facts], silent: dict[str, str]) -> list[Finding]:
    """What is wrong, host by host.

    Args:
        facts: by host.
        silent: the hosts of which there are no facts, and why.
    """
    findings = [Finding(host, "reachable", reason) for host, reason in silent.items()]
    for check in CHECKS.values():
        findings.extend(check(job, facts))
    order = ["all", *job.slots]
    return sorted(findings, key=lambda finding: (order.index(finding.host), not finding.fatal))


def _differing(facts: dict[str, Facts], value: Callable[[Facts], Value]) -> Iterator[tuple[str, Value, str, Value]]:
    """The hosts whose value is not the first host's: host, its value, the first host, that one's value."""
    first, *others = facts or [""]
    for host in others:
        if value(facts[host]) != value(facts[first]):
            yield host, value(facts[host]), first, value(facts[first])


def check_batch(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The recipe's batch and schedule fit this number of ranks, and that of the fewest hosts; between, it is told."""
    every = len(job.slots)
    for hosts in range(job.fewest or every, every + 1):
        world = sum(list(job.slots.values())[:hosts])
        try:
            plan_of(job.config, read_deepspeed_json(Path(job.config.run.deepspeed)), world=world)
        except InputError as error:
            with_fewer = "" if hosts == every else f"with {hosts} host{'s'[: hosts != 1]}: "
            yield Finding("all", "batch", f"{with_fewer}{error}", fatal=hosts in (job.fewest, every))


def check_versions(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """Python and packages are the first host's."""
    for host, mine, first, theirs in _differing(
        facts, lambda one: {"python": one.software.python} | one.software.versions
    ):
        other = [name for name in theirs if mine.get(name) != theirs[name]]
        here = ", ".join(f"{name} {mine.get(name) or 'missing'}" for name in other)
        there = ", ".join(theirs[name] or "missing" for name in other)
        yield Finding(host, "versions", f"{here}; {first} has {there}")


def check_source(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The package's files are the first host's."""
    for host, _, first, _ in _differing(facts, lambda one: one.software.sha256):
        revisions = [facts[name].software.revision or "no checkout" for name in (host, first)]
        yield Finding(
            host,
            "source",
            f"other files of merit_ds ({revisions[0]}) than on {first} ({revisions[1]}): update one of them",
        )


def check_recipe(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """Everybody reads the same recipe."""
    readable = {host: one for host, one in facts.items() if not one.recipe.problem}
    for host, one in facts.items():
        if one.recipe.problem:
            yield Finding(host, "recipe", one.recipe.problem)
    for host, _, first, theirs in _differing(readable, lambda one: one.recipe.sha256):
        other = [path for path, sha256 in facts[host].recipe.sha256.items() if theirs.get(path) != sha256]
        yield Finding(host, "recipe", f"{', '.join(other)}: not the file that {first} has; copy it there")


def check_data(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The data is there, is what its manifest says, and is the same everywhere."""
    whole = {host: one for host, one in facts.items() if one.data and not one.data.problem}
    for host, one in facts.items():
        if one.data and one.data.problem:
            yield Finding(host, "data", one.data.problem)
    for host, _, first, _ in _differing(whole, lambda one: one.data and one.data.sha256):
        yield Finding(host, "data", f"{job.config.data.prefix}: other data than on {first}; copy that here")


def check_devices(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The hostfile's slots are there, and all hosts have one kind of accelerator."""
    for host, one in facts.items():
        machine, slots = one.machine, job.slots[host]
        if machine.devices < slots:
            what = "CPU cores" if machine.device == "cpu" else f"{machine.device} devices"
            # Ranks can share cores, but not a GPU.
            text = f"slots={slots}, but {machine.devices} {what}: the hostfile says more than there is"
            yield Finding(host, "devices", text, fatal=machine.device != "cpu")
    for host, here, first, there in _differing(facts, lambda one: one.machine.device):
        yield Finding(host, "devices", f"DeepSpeed finds {here} here and {there} on {first}; see DS_ACCELERATOR")


def check_port(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The master's port is free, and reached from everywhere."""
    for host, one in facts.items():
        if one.met and one.met.problem:
            yield Finding(host, "port", one.met.problem)


def check_shared(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """`run.save` can be written, and is one folder for all."""
    for host, one in facts.items():
        problem = (one.save and one.save.problem) or (one.met and one.met.folder_problem)
        if problem:
            yield Finding(host, "run.save", problem)


def check_disk(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The checkpoints that `run.keep_checkpoints` keeps fit, with the one being written and the newest's conversion."""
    keep = job.config.run.keep_checkpoints
    for host, one in facts.items():
        if one.save is None or one.save.path is None or one.save.problem or not one.data or not one.data.vocab_size:
            continue
        size = checkpoint_bytes(job.config, vocab_size=one.data.vocab_size)
        converted = one.save.ranks not in (None, job.world)
        wanted = max(1, keep + 1 - one.save.checkpoints) + converted
        which = f"run.keep_checkpoints {keep}, the one being written"
        which += f", and the newest, of {one.save.ranks} ranks, converted for {job.world}" if converted else ""
        if one.save.free_bytes < wanted * size:
            yield Finding(
                host,
                "disk",
                f"{one.save.path}: {gigabytes(one.save.free_bytes)} free, but {wanted} more checkpoints of about "
                f"{gigabytes(size)} are to lie there at once ({which})",
            )


def check_clock(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """The clocks agree."""
    for host, one in facts.items():
        ahead = one.met.clock_seconds if one.met else None
        if ahead is not None and abs(ahead) > CLOCK_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            text = f"its clock is {abs(ahead):.0f} s {way} the first host's; see its NTP service"
            yield Finding(host, "clock", text, fatal=False)


def check_limits(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """Limits that stop NCCL or a large run."""
    first, wanted = next(iter(job.slots)), job.world + GUARD_FILES
    if first in facts and 0 <= facts[first].machine.open_files_hard < wanted:
        text = f"{facts[first].machine.open_files_hard} open files at most (ulimit -Hn), but rank 0's guard holds a "
        yield Finding(first, "limits", f"{text}connection for each of {job.world} ranks: raise it to {wanted}")
    for host, one in facts.items():
        if 0 <= one.machine.open_files < OPEN_FILES:
            text = f"{one.machine.open_files} open files at most (ulimit -n); {OPEN_FILES} and more are wanted"
            yield Finding(host, "limits", text, fatal=False)
        if one.machine.device != "cpu" and len(job.slots) > 1 and one.machine.locked_memory >= 0:
            text = "locked memory is limited (ulimit -l), so InfiniBand cannot be used; make it unlimited"
            yield Finding(host, "limits", text, fatal=False)


def check_name(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """Gloo listens where the host's own name points to, unless it is given an interface."""
    if len(job.slots) == 1:
        return
    for host, one in facts.items():
        machine = one.machine
        for variable, interface in machine.chosen.items():
            if not _names_one(interface, machine.interfaces, exactly=variable == "GLOO_SOCKET_IFNAME"):
                have = ", ".join(name for name in machine.interfaces if name != "lo")
                yield Finding(host, "network", f"{variable}={interface}, but its interfaces are {have}")
        if "GLOO_SOCKET_IFNAME" in machine.chosen:
            continue
        if machine.own_address is None or machine.own_address.startswith("127."):
            points = f"is {machine.own_address}" if machine.own_address else "has no address"
            text = f"its own name {points} to it, where no other host reaches gloo: set GLOO_SOCKET_IFNAME"
            yield Finding(host, "network", text, fatal=machine.device == "cpu")


def _names_one(choice: str, interfaces: list[str], *, exactly: bool) -> bool:
    """Whether an interface is meant: by name, or as NCCL reads it: prefixes, names after =, any others after ^."""
    if exactly or choice.startswith("="):
        return bool(set(choice.removeprefix("=").split(",")) & set(interfaces))
    prefixes = tuple(choice.removeprefix("^").split(","))
    return any(name.startswith(prefixes) != choice.startswith("^") for name in interfaces)


def check_comm_op(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """DeepSpeed's communication op for CPUs is built, and no killed build's lock lies there."""
    for host, one in facts.items():
        state, _, path = one.machine.comm_op.partition(" ")
        if state == "locked":
            yield Finding(host, "build", f"DeepSpeed would wait forever on {path}, left by a killed build: rm {path}")
        elif state == "busy":
            text = f"{path} was made minutes ago: another host is building, or was killed; the run would wait for it"
            yield Finding(host, "build", text, fatal=False)
        elif one.machine.comm_op == "not built":
            text = "DeepSpeed will build its CPU op at the start, for minutes: python -m merit_ds.training.cpu_comm"
            yield Finding(host, "build", text, fatal=False)


def check_shm(job: Job, facts: dict[str, Facts]) -> Iterator[Finding]:
    """Room in /dev/shm for the ranks of a host."""
    for host, one in facts.items():
        slots, free = job.slots[host], one.machine.shm_free
        on_cpu = one.machine.device == "cpu"
        wanted = SHARED_BYTES * slots if on_cpu else NCCL_SHM_BYTES
        if slots > 1 and free < wanted:
            text = f"/dev/shm has {gigabytes(free)} free of the {gigabytes(wanted)} wanted; in a container: --ipc=host"
            yield Finding(host, "shm", text, fatal=on_cpu)


CHECKS: dict[str, Check] = {
    "batch": check_batch,
    "versions": check_versions,
    "source": check_source,
    "recipe": check_recipe,
    "data": check_data,
    "devices": check_devices,
    "port": check_port,
    "run.save": check_shared,
    "disk": check_disk,
    "clock": check_clock,
    "limits": check_limits,
    "network": check_name,
    "build": check_comm_op,
    "shm": check_shm,
}
