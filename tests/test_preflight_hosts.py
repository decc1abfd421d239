# SPDX-License-Identifier: Apache-2.0
"""What the preflight collects its facts with: the hosts' meeting, ssh, hostfiles, the launcher's variables."""

import argparse
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import _parse_hostfile
from preflight_case import write_case
from ranks import free_port
from test_recipes import CONFIGS

from merit_ds.errors import InputError
from merit_ds.preflight import facts as host_facts
from merit_ds.preflight import meeting as meetings
from merit_ds.preflight.facts import collect
from merit_ds.preflight.hosts import Ssh, launcher_exports, read_hostfile
from merit_ds.preflight.meeting import Meeting, Met, meet
from merit_ds.training.cli import add_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("preflight"))


def hold(first: Path | None, second: Path | None, *, numbers: str = "77", seconds: float = 20) -> list[Met]:
    """A meeting of two, each in a thread."""
    port, met = free_port(), [Met(), Met()]

    def attend(rank: int) -> None:
        met[rank] = meet(Meeting("127.0.0.1", port, numbers[rank], rank, 2, seconds), (first, second)[rank])

    threads = [threading.Thread(target=attend, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return met


def test_hosts_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = hold(tmp_path, tmp_path)
    assert (first, second.problem, second.folder_problem) == (Met(), None, None)
    assert second.clock_seconds is not None and abs(second.clock_seconds) < 1
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(meetings, "VISIBLE_SECONDS", 0.5)
    other = tmp_path / "other"
    other.mkdir()
    first, second = hold(tmp_path, other)
    assert first == Met() and "what it writes there does not appear here" in str(second.folder_problem)
    assert list(tmp_path.iterdir()) == [other]
    assert "does not appear here" in str(hold(tmp_path, tmp_path / "none")[1].folder_problem)


def test_hosts_meet_before_they_read_their_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose disk is slower than the others wait still meets them."""
    monkeypatch.chdir(folder)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--config", "recipe.yaml"])
    options.hash_data = False
    read, port, found = host_facts._data, free_port(), {}

    def slowly(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread().name == "0":
            time.sleep(3)
        return read(*arguments, **named)

    def look(rank: int) -> None:
        found[rank] = collect(f"h{rank}", options, Meeting("127.0.0.1", port, "7", rank, 2, seconds=1.5))

    monkeypatch.setattr(host_facts, "_data", slowly)
    threads = [threading.Thread(target=look, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[rank].met.problem for rank in range(2)] == [None, None]
    assert [found[rank].data.problem for rank in range(2)] == [None, None]


def test_every_host_is_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh ends only when all have started."""
    (tmp_path / "started").mkdir()
    stand_in = f"""#!/bin/sh
cd {tmp_path}/started && : > $$
until [ -e ../all ]; do set -- *; [ $# -lt 80 ] || : > ../all; sleep 0.5; done
"""
    (tmp_path / "ssh").write_text(stand_in)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers = list(Ssh(port=None, seconds=30).run({f"h{number}": "true" for number in range(80)}))
    assert answers == [(f"h{number}", "") for number in range(80)]


def test_a_stranger_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "STRANGER_SECONDS", 0.5)  # before the listener's own time is up
    start = time.monotonic()
    first, second = hold(None, None, numbers="78", seconds=2)
    assert first == Met() and "something else listens there" in str(second.problem)
    assert time.monotonic() - start < 30


def test_a_port_that_something_else_holds_in_silence_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "STRANGER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        start = time.monotonic()
        met = meet(Meeting("127.0.0.1", holder.getsockname()[1], "7", 1, 2, 60), None)
    assert "something else listens there" in str(met.problem) and time.monotonic() - start < 30


def test_a_master_that_is_not_there() -> None:
    met = meet(Meeting("127.0.0.1", free_port(), "7", 1, 2, 0.5), None)
    assert "where the ranks will meet: Connection refused" in str(met.problem)


HOSTFILES = [
    "h0 slots=8\nh1 slots=8\n",
    "# two\n\n  h1   slots=2  \n#h2 slots=1\nh0\tslots=1",
    "h0",
    "h0 slots=x\n",
    "h0 slots = 8",
    "h0 slots=8\nh0 slots=4\n",
    "",
    "# none\n",
]


@pytest.mark.parametrize("text", HOSTFILES)
def test_hostfiles_are_read_as_deepspeed_reads_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts").write_text(text)
    try:
        expected = list(_parse_hostfile(text.splitlines()).items())
    except ValueError:
        with pytest.raises(InputError, match="hosts"):
            read_hostfile(tmp_path / "hosts")
    else:
        assert list(read_hostfile(tmp_path / "hosts").items()) == expected


def test_a_hostfile_s_fault_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h0 slots=1\n\nh1: 2\n")
    with pytest.raises(InputError, match=r"hosts:3: 'h1: 2' is not `NAME slots=N`"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(InputError, match="cannot read the hostfile: No such file"):
        read_hostfile(tmp_path / "none")


def test_the_launcher_s_variables_are_those_of_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `.deepspeed_env` has them, expanded on the other side; DeepSpeed's own traceback for a comment is foreseen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UCX_X", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    example = CONFIGS.parent / "launch" / "deepspeed_env.example"
    lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
    Path(".deepspeed_env").write_text("\n".join(lines))
    script = launcher_exports() + "env"
    shown = subprocess.check_output(["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, text=True)
    there = dict(line.split("=", 1) for line in shown.splitlines())
    assert there["PATH"] == "/path/to/merit_ds/.venv/bin:/usr/bin:/bin" and there["GLOO_SOCKET_IFNAME"] == "eth0"
    assert there["UCX_X"] == "1" and there["PYTHONPATH"].startswith(str(tmp_path)) and "DS_ACCELERATOR" not in there
    Path(".deepspeed_env").write_text("A=1\n# no\n")
    with pytest.raises(InputError, match=r"\.deepspeed_env:2: '# no' is not NAME=VALUE"):
        launcher_exports()


def test_a_master_whose_name_the_first_host_does_not_know() -> None:
    met = meet(Meeting("no-such-host.invalid", free_port(), "7", 0, 2, 0.5), None)
    assert met.problem is not None and met.problem.startswith("cannot find no-such-host.invalid: ")
    assert "--master-addr" in met.problem
