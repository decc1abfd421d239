# SPDX-License-Identifier: Apache-2.0
"""The hosts: DeepSpeed's hostfile, and collecting their facts over ssh."""

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from pydantic import ValidationError

from merit_ds.errors import InputError
from merit_ds.preflight.facts import Facts

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
"""Asks nobody for a password, and gives up a host that does not answer for 10 to 15 s."""


def read_hostfile(path: Path) -> dict[str, int]:
    """DeepSpeed's hostfile: a line `NAME slots=N` for each host, comments after # on lines of their own.

    Returns:
        Ranks by host, in the file's order: the first host's are the first ranks.

    Raises:
        InputError: with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path}: cannot read the hostfile: {reason}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)$", line)
        if match is None or int(match[2]) == 0:
            raise InputError(f"{path}:{number}: {line!r} is not `NAME slots=N`, for instance: node1 slots=8")
        if match[1] in slots:
            raise InputError(f"{path}:{number}: {match[1]} is there twice; give it one line with all its slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise InputError(f"{path}: no host in it; it needs a line for each, for instance: node1 slots=8")
    return slots


def read_facts(text: str) -> list[Facts]:
    """The facts among what `merit_ds.preflight.facts` printed, on one host or on several.

    Raises:
        InputError: there are none, or they are of another version.
    """
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise InputError("no facts of a host among what was printed")
    try:
        return [Facts.model_validate_json(line) for line in lines]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"facts by another version of merit_ds: {where}: {first['msg']}") from None


def launcher_exports() -> str:
    """What DeepSpeed's pdsh launcher sets on each host before a command: the few variables that travel.

    Raises:
        InputError: a line of `.deepspeed_env` is not NAME=VALUE, at which the launcher would end with a traceback.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    gathered = SimpleNamespace(exports={})
    path = os.pathsep.join([os.path.abspath("."), *filter(None, [os.environ.get("PYTHONPATH")])])
    prefixes = (*runner.EXPORT_ENVS, *get_accelerator().export_envs())
    for name, value in (os.environ | {"PYTHONPATH": path}).items():
        if name.startswith(prefixes):
            MultiNodeRunner.add_export(gathered, name, value)
    for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
        file = Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME)
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), start=1):
            name, equals, value = line.partition("=")
            if not equals or not name.strip().isidentifier():
                raise InputError(
                    f"{file}:{number}: {line!r} is not NAME=VALUE; DeepSpeed takes no comments or empty lines there"
                )
            MultiNodeRunner.add_export(gathered, name, value)
    return "".join(f"export {name}={value}; " for name, value in gathered.exports.items())


class Ssh:
    """Commands on the hosts, by way of ssh."""

    def __init__(self, *, port: int | None, seconds: float | None) -> None:
        """Args: seconds: after which a command that has not ended is given up; None: never."""
        self._ssh = [*SSH, *([] if port is None else ["-p", str(port)])]
        self._seconds = seconds

    def run(self, commands: dict[str, str]) -> Iterator[tuple[str, str | InputError]]:
        """Run a command on each host at once: what it printed, or why there is nothing, as they end.

        All of them, however many: those that waited for a free thread would come too late to the meeting.
        """
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection needs two pipes
        with ThreadPoolExecutor(len(commands) or 1) as pool:
            yield from zip(commands, pool.map(self._one, commands.items()), strict=True)

    def _one(self, item: tuple[str, str]) -> str | InputError:
        host, command = item
        try:
            finished = subprocess.run(
                [*self._ssh, host, command],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=self._seconds,
            )
        except subprocess.TimeoutExpired:
            return InputError(f"no answer within {self._seconds:.0f} s")
        if finished.returncode:
            last = (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]
            return InputError(last)
        return finished.stdout


def python_command(*arguments: str) -> str:
    """As the launcher would start a rank: in this folder, by this Python, with what it exports."""
    command = shlex.join([sys.executable, *arguments])
    return f"{launcher_exports()}cd {shlex.quote(os.path.abspath('.'))} && {command}"
