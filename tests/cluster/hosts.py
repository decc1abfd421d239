# SPDX-License-Identifier: Apache-2.0
"""Real hosts on one Linux machine: each with an address, a name, processes, shared memory and an sshd of its own.

A host is a set of namespaces (network, mount, host name, processes), joined to the others by a bridge in a network
namespace of its own, so several test beds do not see one another. Files are shared, as on a cluster's network disk.
Needs root, iproute2, util-linux and openssh-server; `missing()` says what is not there. Everything ends with the
process that made it, however that ends.

    host 0  10.77.0.1 eth0 --+
    host 1  10.77.0.2 eth0 --+-- bridge
    host 2  10.77.0.3 eth0 --+
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

NETWORK = "10.77.0"
SSH_PORT = 2222
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh")
WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
INIT = """#!/bin/bash
set -e
hostname {name}
mount --bind {folder}/ssh {home}/.ssh
mount --bind {folder}/nsswitch /etc/nsswitch.conf
mount --bind {hosts} /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
until ip address show eth0 2>/dev/null | grep -q "inet "; do sleep 0.02; done
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
"""
SSH = f"""
Host *
 Port {SSH_PORT}
 StrictHostKeyChecking accept-new
 LogLevel ERROR
"""


def missing() -> str | None:
    """What this machine lacks to make hosts, in one line; None where it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists()]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server pdsh iproute2 util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    if tried.returncode:
        return f"namespaces are not allowed here: {tried.stderr.decode().strip()}"
    return None


class Hosts:
    """`count` hosts, named h0, h1, ..., from entering to leaving.

    Args:
        folder: for keys, logs and the hostfile; an empty one.
        count: of hosts, at most 250.
        slots: ranks on each, for the hostfile.
    """

    def __init__(self, folder: Path, count: int, *, slots: int = 1) -> None:
        self.folder = folder
        self.names = [f"h{index}" for index in range(count)]
        self.addresses = [f"{NETWORK}.{index + 1}" for index in range(count)]
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        entries = [("127.0.0.1", "localhost"), *zip(self.addresses, self.names, strict=True)]
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in entries))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._inits: dict[int, int] = {}
        """Host to the process id, out here, of its process 1."""

    def __enter__(self) -> "Hosts":
        (Path.home() / ".ssh").mkdir(mode=0o700, exist_ok=True)
        _key(self.folder / "key")
        self._switch = self._first_child([*WITH_PARENT, "unshare", "--net", "--fork", "--kill-child", "sleep", "inf"])
        self._ip(self._switch, "link add bridge type bridge")
        self._ip(self._switch, "link set bridge up")
        for index in range(len(self.names)):
            self._create(index)
        for index in range(len(self.names)):
            self._wait_for_sshd(index)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def boot(self, index: int) -> None:
        """Start a host again after `crash`."""
        self._create(index)
        self._wait_for_sshd(index)

    def command(self, index: int, *argv: str, cwd: Path | str = "/") -> list[str]:
        """The command that runs `argv` on the host."""
        enter = ["nsenter", "-t", str(self._inits[index]), "-n", "-p", "-u", "-m", "--"]
        return [*enter, "env", f"--chdir={cwd}", *argv]  # nsenter itself leaves the working directory

    def run(self, index: int, *argv: str, cwd: Path | str = "/", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `argv` on the host to its end; options as `subprocess.run` has them."""
        return subprocess.run(self.command(index, *argv, cwd=cwd), **{"text": True, "capture_output": True, **options})

    def start(self, index: int, *argv: str, cwd: Path | str = "/", **options: Any) -> subprocess.Popen[str]:
        """Start `argv` on the host, both outputs in one pipe; options as `subprocess.Popen` has them."""
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*WITH_PARENT, *self.command(index, *argv, cwd=cwd)], **{**pipes, **options})

    def processes(self, index: int, *needles: str) -> list[psutil.Process]:
        """The host's processes whose command line has all needles in it, the oldest first."""
        space = os.readlink(f"/proc/{self._inits[index]}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                line = shlex.join(process.cmdline())
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and all(needle in line for needle in needles):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def cut(self, index: int) -> None:
        """Take the host's link away: packets are lost, no connection is closed."""
        self._ip(self._switch, f"link set port{index} down")

    def heal(self, index: int) -> None:
        """Give the link back."""
        self._ip(self._switch, f"link set port{index} up")

    def crash(self, index: int) -> None:
        """Kill process 1 of the host, and all others with it."""
        os.kill(self._inits[index], signal.SIGKILL)

    def namespace(self, index: int) -> Path:
        """The host's network namespace, for a container that is to live in it."""
        return Path(f"/proc/{self._inits[index]}/ns/net")

    def _create(self, index: int) -> None:
        folder = self.folder / self.names[index]
        ssh = folder / "ssh"
        ssh.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(self.folder / "key", ssh / "id_ed25519")
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        (ssh / "config").write_text(SSH)
        _key(folder / "host_key")
        names = {"name": self.names[index], "folder": folder, "home": Path.home(), "hosts": self.folder / "hosts"}
        address = self.addresses[index]
        (folder / "sshd_config").write_text(SSHD.format(port=SSH_PORT, address=address, **names))
        (folder / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
        sshd = shutil.which("sshd") or "/usr/sbin/sshd"
        (folder / "init").write_text(INIT.format(sshd=sshd, **names))
        spaces = ["--net", "--mount", "--uts", "--pid", "--mount-proc"]
        init = ["bash", str(folder / "init")]
        pid = self._first_child([*WITH_PARENT, "unshare", *spaces, "--fork", "--kill-child", *init], folder / "log")
        self._inits[index] = pid
        # The address of the network card stays through a crash, as a real one's: the others still know it.
        card, port = f"eth0 address 02:00:00:00:00:{index:02x} netns {pid}", f"port{index} netns {self._switch}"
        _call("ip", "link", "add", *f"{card} type veth peer {port}".split())
        self._ip(self._switch, f"link set port{index} master bridge up")
        self._ip(pid, f"address add {address}/24 dev eth0")
        self._ip(pid, "link set lo up")
        self._ip(pid, "link set eth0 up")

    def _first_child(self, argv: list[str], log: Path | None = None) -> int:
        with (log or Path(os.devnull)).open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self._processes.append(process)
        for _ in _patiently(f"{argv} has no child"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                return int(children[0])
        raise AssertionError

    def _wait_for_sshd(self, index: int) -> None:
        for _ in _patiently(f"{self.names[index]}: no sshd: {self.folder / self.names[index] / 'log'}"):
            if "Server listening" in (self.folder / self.names[index] / "log").read_text():
                return

    def _ip(self, pid: int, words: str) -> None:
        _call("nsenter", "-t", pid, "-n", "ip", *words.split())


def environment(variables: Mapping[str, str]) -> str:
    """The text of a `.deepspeed_env`, which carries variables to all hosts."""
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def _patiently(complaint: str, seconds: float = 20) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)
    raise AssertionError(complaint)


def _key(path: Path) -> None:
    if not path.exists():
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)


def _call(*argv: object) -> None:
    finished = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert finished.returncode == 0, f"{argv}: {finished.stderr}"
