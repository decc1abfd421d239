# SPDX-License-Identifier: Apache-2.0
"""Who is to blame when a job is lost, and that every rank ends then: the guards beside the ranks."""

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

from merit_ds.training.guard.judge import LEAVE_SECONDS, SETTLE_SECONDS, SLOW, Judge
from merit_ds.training.watch import GUARD

TIMEOUT = 20.0


def judge(world=3):
    """All have arrived, and have begun the same three things."""
    made = Judge(world=world, timeout=TIMEOUT, beat=1.0, now=0.0)
    for rank in range(world):
        made.arrived(rank, f"h{rank}", 1.0)
        beat(made, rank, 2.0, marks=3)
    return made


def beat(made, rank, now, *, marks, doing="in the forward pass of step 7", event="beat", state="S", **more):
    message = {
        "event": event,
        "marks": marks,
        "pulse": 0,
        "doing": doing,
        "slow": False,
        "state": state,
        "reason": None,
    }
    made.heard(rank, message | more, now)


def later(made, now, *, marks, **messages):
    """Everybody beats every second until `now`; `messages` are rank0=..., by rank."""
    for second in range(3, int(now) + 1):
        for rank in made.ranks:
            beat(made, rank, float(second), marks=marks, **messages.get(f"rank{rank}", {}))


def test_a_job_that_comes_further_is_not_lost():
    made = judge()
    for second in range(3, 100):
        for rank in range(3):
            beat(made, rank, float(second), marks=second)
        assert made.verdict(float(second)) is None
    assert not made.all_left()
    for rank in range(3):
        beat(made, rank, 100.0, marks=100, event="left")
    assert made.verdict(1000.0) is None and made.all_left()


def test_a_killed_rank_is_the_cause_of_the_errors_around_it():
    made = judge()
    beat(made, 0, 3.0, marks=3, event="left", reason="RuntimeError: Connection reset by peer")
    beat(made, 1, 3.5, marks=3, event="died")
    made.disconnected(2, 3.6)
    assert made.verdict(3.5 + SETTLE_SECONDS / 2) is None
    line = made.verdict(3.5 + SETTLE_SECONDS)
    assert line == "rank 1 on h1 was killed or crashed while in the forward pass of step 7"
    assert not made.all_left()


def test_a_host_that_goes_down_comes_before_the_errors_around_it():
    made = judge()
    beat(made, 0, 3.0, marks=3, event="left", reason="RuntimeError: Connection reset by peer")
    made.disconnected(2, 3.6)
    assert made.verdict(3.6 + SETTLE_SECONDS).startswith("rank 2 on h2 is gone, last seen in the forward pass")


def test_an_error_is_everybodys_end_only_where_others_do_not_end():
    made = judge()
    beat(made, 1, 3.0, marks=3, event="left", reason="InputError: no room")
    for second in range(3, 14):
        for rank in (0, 2):
            beat(made, rank, float(second), marks=3)
    assert made.verdict(3.0 + LEAVE_SECONDS - 1) is None
    assert (
        made.verdict(3.0 + LEAVE_SECONDS)
        == "rank 1 on h1 stopped while in the forward pass of step 7: InputError: no room"
    )
    for rank in (0, 2):
        beat(made, rank, 14.0, marks=3, event="left", reason="InputError: no room")
    assert made.all_left()


def test_a_rank_that_does_not_come_is_named():
    made = Judge(world=4, timeout=TIMEOUT, beat=1.0, now=0.0)
    for rank in (0, 2):
        made.arrived(rank, "h0", 1.0)
    assert made.verdict(TIMEOUT) is None
    assert made.verdict(TIMEOUT + 1) == "ranks 1, 3 (2) of 4 did not start within 20 s"


def test_silence_is_noticed_after_the_timeout():
    made = judge()
    for second in range(3, 30):
        for rank in (0, 1):
            beat(made, rank, float(second), marks=second)
    assert made.verdict(2.0 + TIMEOUT) is None
    assert made.verdict(2.5 + TIMEOUT).startswith("rank 2 on h2 has not been heard of for 20 s")


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (
            {"rank1": {"state": "T"}},
            "rank 1 on h1 has been in the forward pass of step 7 for 28 s (its process is st",
        ),
        ({"rank2": {"doing": "reading step 7"}}, "no rank has come further for 28 s"),
    ],
)
def test_a_job_that_stands_still_is_lost(messages, line):
    made = judge()
    later(made, 30, marks=3, **messages)
    assert made.verdict(30.0).startswith(line)


def test_the_rank_that_is_behind_is_named():
    made = judge()
    for rank in (0, 1):
        beat(made, rank, 4.0, marks=4, doing="in the backward pass of step 7")
    for second in range(5, 31):
        for rank in range(3):
            beat(made, rank, float(second), marks=4 if rank < 2 else 3)
    assert made.verdict(30.0) == "rank 2 on h2 has been in the forward pass of step 7 for 28 s: the others wait"


def test_an_error_in_the_start_is_told_to_ranks_that_come_later():
    made = Judge(world=3, timeout=TIMEOUT, beat=1.0, now=0.0)
    made.arrived(0, "h0", 1.0)
    beat(made, 0, 2.0, marks=1, event="left", reason="InputError: a lock", doing="starting")
    assert not made.all_left()
    assert made.verdict(2.0 + LEAVE_SECONDS) == "rank 0 on h0 stopped while starting: InputError: a lock"


def test_a_host_without_power_is_named_before_the_neighbours_that_fail():
    made = judge()
    for second in range(3, 12):
        for rank in (0, 1):
            beat(made, rank, float(second), marks=3)
    beat(made, 1, 12.0, marks=3, event="died")
    assert made.verdict(12.0 + SETTLE_SECONDS).startswith("rank 2 on h2 has not been heard of for 11 s")


def test_a_rank_that_comes_twice_is_named():
    made = judge()
    made.arrived(1, "h7", 3.0)
    assert made.verdict(3.0) == "rank 1 came from h1 and again from h7: two nodes have the same number"


def test_a_pulse_is_progress():
    made = judge()
    for second in range(3, 100):
        for rank in range(3):
            beat(made, rank, float(second), marks=4, pulse=second if rank == 2 else 0)
        assert made.verdict(float(second)) is None


def test_a_stopped_rank_is_not_slow_work():
    made = judge()
    for second in range(3, 31):
        for rank in range(3):
            beat(made, rank, float(second), marks=3, slow=True, state="T" if rank == 1 else "S")
    assert made.verdict(30.0).startswith("rank 1 on h1 has been ")


def test_slow_work_may_take_longer():
    made = judge()
    for second in range(3, 200):
        for rank in range(3):
            beat(made, rank, float(second), marks=4, slow=rank == 0)
    assert made.verdict(3 + SLOW * TIMEOUT) is None
    assert made.verdict(4 + SLOW * TIMEOUT).startswith("no rank has come further")


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
    settings |= {"limit": limit, "address": "127.0.0.1", "listen": "127.0.0.1", "token": "secret"}
    command = [sys.executable, "-I", str(GUARD)]
    process = subprocess.Popen(
        ["bash", "-c", f"ulimit -S -n 30 && exec {shlex.join(command)}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    process.stdin.flush()
    return process, int(process.stdout.readline())


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
