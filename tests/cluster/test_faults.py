# SPDX-License-Identifier: Apache-2.0
"""What may happen to a job on two hosts: it ends in time and names the cause, or goes on; nothing saved is lost.

`docs/faults.md` has the outcomes and how long each took.
"""

import time

import job
import launch
import pytest
from launch import assert_same_run, losses

TIMEOUT = 20
STEPS = 12
# From the fault to the end of the last rank and launcher. Theirs are polls of 1 s, and ssh's patience with a dead host.
SLACK = 10


@pytest.fixture(scope="module")
def reference(hosts, folder):
    """The run that nothing disturbs."""
    job.write_recipe(folder, steps=STEPS, batch=4, micro_batch=2, timeout=TIMEOUT, save_interval=4)
    process = job.start(hosts, folder, "--save", "reference", ranks=2)
    output = job.finish(process)
    assert process.returncode == 0, output
    return folder / "reference"


def disturb(hosts, folder, save, act, *, step=5, ends=True):
    """Start the job, `act` after `step`; seconds from then to the end of launcher and ranks, and the output."""
    process = job.start(hosts, folder, "--save", save, "--load", save, ranks=2)
    job.wait_for_step(process, folder / save, step)
    act()
    start = time.monotonic()
    output = job.finish(process)
    job.wait_until(lambda: not hosts.processes(1, "pretrain_gpt.py"), process, within=60) if ends else None
    return time.monotonic() - start, output


def rank(hosts, number):
    """The process of the rank on the host of that number."""
    return hosts.processes(number, "pretrain_gpt.py", "--local_rank=0")[-1]


def finish_undisturbed(hosts, folder, save, reference):
    """The same command again: it continues, and nothing tells its run from the one that was not disturbed."""
    process = job.start(hosts, folder, "--save", save, "--load", save, ranks=2)
    output = job.finish(process)
    assert process.returncode == 0 and "continuing from step " in output, output
    assert_same_run(folder / save, reference)


def test_a_killed_rank(hosts, folder, reference):
    seconds, output = disturb(hosts, folder, "killed", lambda: rank(hosts, 1).kill())
    assert job.errors(output)[0].startswith("rank 1 on h1 was killed or crashed while "), output
    assert seconds < TIMEOUT
    finish_undisturbed(hosts, folder, "killed", reference)


def test_a_host_that_crashes(hosts, folder, reference):
    seconds, output = disturb(hosts, folder, "crashed", lambda: hosts.crash(1), ends=False)
    hosts.boot(1)
    assert job.errors(output)[0].startswith("rank 1 on h1 "), output
    assert seconds < TIMEOUT + SLACK
    finish_undisturbed(hosts, folder, "crashed", reference)


def test_a_link_that_is_cut_for_good(hosts, folder, reference):
    try:
        seconds, output = disturb(hosts, folder, "cut", lambda: hosts.cut(1))
    finally:
        hosts.heal(1)
    assert job.errors(output)[0].startswith("rank 1 on h1 has not been heard of for "), output
    assert seconds < TIMEOUT + SLACK
    finish_undisturbed(hosts, folder, "cut", reference)


def test_a_link_that_is_cut_for_five_seconds(hosts, folder, reference):
    def blink():
        hosts.cut(1)
        time.sleep(5)
        hosts.heal(1)

    _, output = disturb(hosts, folder, "blink", blink)
    assert not job.errors(output), output
    assert_same_run(folder / "blink", reference)


def test_a_stopped_rank(hosts, folder, reference):
    seconds, output = disturb(hosts, folder, "stopped", lambda: rank(hosts, 1).suspend())
    assert job.errors(output)[0].startswith("rank 1 on h1 has been ") and "(its process is stopped)" in output, output
    assert seconds < TIMEOUT + SLACK
    finish_undisturbed(hosts, folder, "stopped", reference)


def test_a_slow_rank_slows_the_job_and_no_more(hosts, folder, reference):
    def pause():
        for _ in range(3):
            rank(hosts, 1).suspend()
            time.sleep(1)
            rank(hosts, 1).resume()
            time.sleep(0.1)

    _, output = disturb(hosts, folder, "slow", pause)
    assert not job.errors(output), output
    assert_same_run(folder / "slow", reference)


def test_a_rank_that_never_starts(hosts, folder, reference):
    """Rank 0's host is started alone, as `--no_ssh` does it."""
    place = ["--hostfile", str(hosts.hostfile), "--num_nodes", "2", "--no_ssh", "--node_rank", "0"]
    master = ["--master_addr", hosts.addresses[0], "--master_port", "29511"]
    script = [str(launch.REPOSITORY / "pretrain_gpt.py"), "--config", "recipe.yaml"]
    start = time.monotonic()
    process = hosts.start(0, "deepspeed", *place, *master, *script, cwd=folder, env=job.ENVIRONMENT)
    output = job.finish(process)
    assert job.errors(output) == [f"rank 1 of 2 did not start within {TIMEOUT - 6:g} s; every rank ends now"], output
    assert process.returncode != 0 and time.monotonic() - start < TIMEOUT + 2 * SLACK


def test_fewer_hosts_go_on_with_the_same_batch(hosts, folder, reference):
    """After the loss of a host: the checkpoint of two ranks, on one, and back again."""
    disturb(hosts, folder, "fewer", lambda: rank(hosts, 1).kill())
    process = job.start(hosts, folder, "--save", "fewer", "--load", "fewer", ranks=1, local=True)
    output = job.finish(process)
    assert process.returncode == 0, output
    assert "saved by 2 ranks; for 1 ranks now" in output and "train_batch_size stays 4, in 2 micro-batches" in output
    found, expected = losses(folder / "fewer"), losses(reference)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-3) for step in expected)
