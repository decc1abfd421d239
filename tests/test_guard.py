# SPDX-License-Identifier: Apache-2.0
"""The guards beside the ranks: whoever is lost is named, and every rank ends then."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time

import launch
import psutil
import pytest

from merit_ds.training.pace import STEPS
from merit_ds.training.watch import GUARD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("guard")
    launch.prepare_text(path)
    recipe = """
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: recipe.json, train_tokens: 1280000, eval_interval: 99999, eval_sequences: 2}
"""
    settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    (path / "recipe.yaml").write_text(recipe)
    (path / "recipe.json").write_text(json.dumps(settings | {"optimizer": {"type": "Merit", "params": {"lr": 0.01}}}))
    return path


def start(folder, save):
    """Two ranks under the launcher, after step 3."""
    process = subprocess.Popen(
        launch.command("--save", save, "--set", "run.timeout=20"),
        cwd=folder,
        env=launch.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for_step(process, folder / save, 3)
    return process


def wait_for_step(process, save, step):
    deadline = time.monotonic() + 200
    while max(launch.losses(save), default=0) < step:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def disturb(folder, save, act):
    """`act` on the processes of two ranks; the seconds until all had ended, and the output."""
    process = start(folder, save)
    family = psutil.Process(process.pid).children(recursive=True)
    act([next(p for p in family[::-1] if f"--local_rank={rank}" in p.cmdline()) for rank in (0, 1)])
    begin = time.monotonic()
    output = process.communicate(timeout=120)[0]
    seconds = time.monotonic() - begin
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, output
    return seconds, output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named_first(folder, victim):
    seconds, output = disturb(folder, f"kill{victim}", lambda ranks: ranks[victim].kill())
    line = f"error: rank {victim} on {socket.gethostname()} was killed or crashed while "
    assert output.count(line) == 1 and seconds < 20
    assert "Traceback" not in output.split(line)[0]


def test_a_stopped_rank_ends_the_job_within_the_timeout(folder):
    seconds, output = disturb(folder, "stop", lambda ranks: ranks[1].suspend())
    assert f"error: rank 1 on {socket.gethostname()} has been " in output and "(its process is stopped)" in output
    # To the end of the last rank; the launcher looks once a second, and this machine may be busy.
    assert seconds < 90, output


def test_a_slow_rank_is_named_and_the_job_goes_on(folder):
    """Rank 1 stands still for five sixths of the time, in whatever it does."""
    process = start(folder, "slow")
    family = psutil.Process(process.pid).children(recursive=True)
    rank = next(member for member in family[::-1] if "--local_rank=1" in member.cmdline())
    reached, deadline = max(launch.losses(folder / "slow")), time.monotonic() + 200
    try:
        while max(launch.losses(folder / "slow")) < reached + 2 * STEPS and time.monotonic() < deadline:
            rank.suspend()
            time.sleep(0.1)
            rank.resume()
            time.sleep(0.02)
    finally:
        for member in family:
            member.kill()
        output = process.communicate(timeout=60)[0]
    assert f" slow, and all others wait: rank 1 on {socket.gethostname()} (" in output, output
    assert "wait: rank 0" not in output and "error: " not in output, output


def test_a_run_on_one_host_listens_to_that_host_alone(folder):
    """The rendezvous, which torch would open on all addresses, and rank 0's guard; gloo's listen on the host's own."""
    process = start(folder, "listens")
    family = psutil.Process(process.pid).children(recursive=True)
    sockets = [found for member in family for found in member.net_connections("tcp")]
    listening = [found.laddr for found in sockets if found.status == psutil.CONN_LISTEN]
    for member in family:
        member.kill()
    process.communicate(timeout=60)
    assert [address.ip for address in listening if address.port == launch.PORT] == ["127.0.0.1"]
    assert not {"0.0.0.0", "::"} & {address.ip for address in listening}, listening


def test_a_job_that_is_paused_as_a_whole_goes_on(folder):
    """Ctrl-Z and fg: every process stands still for longer than the others may be silent."""
    process = start(folder, "paused")
    family = psutil.Process(process.pid).children(recursive=True)
    for member in family:
        member.suspend()
    time.sleep(17)
    reached = max(launch.losses(folder / "paused"))
    for member in family:
        member.resume()
    wait_for_step(process, folder / "paused", reached + 50)
    for member in family:
        member.kill()
    output = process.communicate(timeout=60)[0]
    assert "error: " not in output, output


@pytest.mark.parametrize(
    ("rank", "line"), [(0, "rank 1 of 2 did not start within"), (1, "rank 1 cannot reach rank 0 there")]
)
def test_a_rank_that_never_starts_is_named(folder, rank, line):
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.PORT)}
    finished = subprocess.run(
        [*launch.command(ranks=0), "--set", "run.timeout=20"],
        cwd=folder,
        env=launch.environment() | place,
        text=True,
        capture_output=True,
        timeout=120,
    )
    errors = [text for text in finished.stderr.splitlines() if text.startswith("error: ")]
    assert finished.returncode != 0 and len(errors) == 1 and line in errors[0], finished.stderr


def spawn_guard(world, limit=60.0):
    """Rank 0's guard, whose rank is this process, and its port."""
    settings = {"rank": 0, "local_rank": 0, "world": world, "host": "here", "pid": os.getpid(), "beat": 0.2}
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    settings |= {"limit": limit, "address": "127.0.0.1", "port": port, "token": "secret"}
    command = [sys.executable, "-I", str(GUARD), str(listener.fileno())]
    process = subprocess.Popen(
        ["bash", "-c", f"ulimit -S -n 30 && exec {shlex.join(command)}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    listener.close()
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"listening\n"
    return process, port


def test_more_ranks_than_the_soft_limit_of_open_files():
    process, port = spawn_guard(world=41)
    ranks = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for rank, connection in enumerate(ranks, start=1):
        connection.sendall(json.dumps({"token": "secret", "rank": rank, "host": "there"}).encode() + b"\n")
    assert all(json.loads(connection.makefile().readline()) == {"verdict": None} for connection in ranks)
    for connection in ranks:
        message = {"event": "left", "marks": 1, "pulse": 0, "doing": "leaving", "slow": False, "state": "S"}
        connection.sendall(json.dumps(message | {"reason": None}).encode() + b"\n")
    process.stdin.write(json.dumps({"reason": None}).encode() + b"\n")
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 0 and complaint == b"", complaint


def test_process_one_of_a_container_is_refused(folder):
    """Nothing in it can kill it: its guard could not end it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    command = ["unshare", "--pid", "--fork", "--mount-proc", *launch.command(ranks=0)]
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    finished = subprocess.run(command, cwd=folder, env=launch.environment() | place, capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stderr.startswith("error: this rank is process 1"), finished.stderr


def test_strangers_are_not_listened_to():
    """A connection without the job's token is closed, and the job goes on."""
    process, port = spawn_guard(world=1)
    for token in ("wrong", None):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(json.dumps({"token": token, "rank": 0, "host": "there"}).encode() + b"\n")
            assert stranger.makefile().read() == ""
    assert process.poll() is None
    process.stdin.write(json.dumps({"reason": None}).encode() + b"\n")
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 0 and complaint == b"", complaint
