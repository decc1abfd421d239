# SPDX-License-Identifier: Apache-2.0
"""What may happen to a job on two hosts: it ends in time and names the cause, or goes on; nothing saved is lost.

`docs/faults.md` has the outcomes and how long each took.
"""

import subprocess
import time

import job
import launch
import pytest
from launch import assert_same_run, losses

TIMEOUT = 20
STEPS = 40
# From the fault to the end of the last rank and launcher. Theirs are polls of 1 s, and ssh's patience with a dead host.
SLACK = 10


@pytest.fixture(scope="module", autouse=True)
def disk(tmp_path_factory):
    """A disk for two checkpoints of 14 MB and no third; mounted before the hosts are there, all see it."""
    path = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def reference(hosts, folder):
    """The run that nothing disturbs."""
    job.write_recipe(folder, steps=STEPS, batch=4, micro_batch=2, timeout=TIMEOUT, save_interval=4)
    process = job.start(hosts, folder, "--save", "reference", ranks=2)
    output = job.finish(process)
    assert process.returncode == 0, output
    return folder / "reference"


def start(hosts, folder, save):
    """The one command of the first start and of every further one."""
    return job.start(hosts, folder, "--save", save, "--load", save, ranks=2)


def begin(hosts, folder, save, *, steps):
    """Start, and wait until so many steps are done since the checkpoint."""
    since, begun = job.saved_step(folder / save), time.time()
    process = start(hosts, folder, save)
    # The steps' lines may be there from before; beginning takes them away.
    job.wait_until(lambda: job.is_newer(folder / save / "run.json", begun), process)
    job.wait_for_step(process, folder / save, since + steps)
    return process


def rank(hosts, number):
    """The process of the rank on the host of that number."""
    return hosts.processes(number, "pretrain_gpt.py", "--local_rank=0")[-1]


def finish_undisturbed(process, save, reference):
    """To the end: it continued, and nothing tells its run from the one that was not disturbed."""
    output = job.finish(process)
    assert process.returncode == 0 and "continuing from step " in output, output
    assert_same_run(save, reference)
    return output


FAULTS = {
    "a killed rank": (lambda hosts: rank(hosts, 1).kill(), "rank 1 on h1 was killed or crashed while ", 10),
    "a stopped rank": (lambda hosts: rank(hosts, 1).suspend(), "rank 1 on h1 has been ", TIMEOUT + SLACK),
    "a crashed host": (lambda hosts: hosts.crash(1), "rank 1 on h1 ", TIMEOUT + SLACK),
    "a cut link": (lambda hosts: hosts.cut(1), "rank 1 on h1 has not been heard of for ", TIMEOUT + SLACK),
}
"""What happens, how the first error line begins, and seconds until all have ended."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_job_in_time_and_is_named(hosts, folder, reference, fault, record_property):
    """One after the other, in one run: each start but the first continues what the fault before has left."""
    act, line, limit = FAULTS[fault]
    process = begin(hosts, folder, "run", steps=5)
    act(hosts)
    seconds = time.monotonic()
    try:
        output = job.finish(process)
        if fault != "a crashed host":
            job.wait_until(lambda: not hosts.processes(1, "pretrain_gpt.py"), within=60)
    finally:
        seconds = time.monotonic() - seconds
        hosts.boot(1) if fault == "a crashed host" else hosts.heal(1)
    record_property("seconds", round(seconds, 1))
    print(f"{fault}: all ended after {seconds:.1f} s: {job.errors(output)[0]}")
    assert job.errors(output)[0].startswith(line) and seconds < limit, output


def test_a_link_that_is_cut_for_five_seconds_and_a_slow_rank_end_nothing(hosts, folder, reference):
    """The run that the faults before have interrupted goes through these, and in the end nothing tells it apart."""
    process = begin(hosts, folder, "run", steps=2)
    hosts.cut(1)
    time.sleep(5)
    hosts.heal(1)
    for _ in range(3):
        rank(hosts, 1).suspend()
        time.sleep(1)
        rank(hosts, 1).resume()
        time.sleep(0.1)
    output = job.finish(process)
    assert process.returncode == 0 and not job.errors(output), output
    assert_same_run(folder / "run", reference)


def test_a_rank_that_never_starts(hosts, folder, reference):
    """Rank 0's host is started alone, as `--no_ssh` does it."""
    place = ["--hostfile", str(hosts.hostfile), "--num_nodes", "2", "--no_ssh", "--node_rank", "0"]
    master = ["--master_addr", hosts.addresses[0], "--master_port", "29511"]
    script = [str(launch.REPOSITORY / "pretrain_gpt.py"), "--config", "recipe.yaml"]
    process = hosts.start(0, "deepspeed", *place, *master, *script, cwd=folder, env=job.ENVIRONMENT)
    output = job.finish(process, within=120)
    assert process.returncode != 0
    assert job.errors(output) == [f"rank 1 of 2 did not start within {TIMEOUT - 6:g} s; every rank ends now"], output


def test_a_full_disk_ends_the_job_and_spares_what_was_saved(hosts, folder, reference, disk):
    save = disk / "run"
    process = start(hosts, folder, str(save))
    output = job.finish(process)
    assert process.returncode != 0
    assert job.errors(output)[0].startswith(f"{save}: cannot save the checkpoint of step 12: rank "), output
    assert sorted(path.name for path in save.glob("*step*")) == ["global_step4", "global_step8"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    finish_undisturbed(start(hosts, folder, str(save)), save, reference)


def test_a_flipped_byte_costs_one_checkpoint_and_fewer_hosts_go_on(hosts, folder, reference):
    """A host is lost, the newest checkpoint is damaged, and the one before goes on on one host, with the same batch."""
    process = begin(hosts, folder, "flipped", steps=9)
    rank(hosts, 1).kill()
    job.finish(process)
    shard = next((folder / "flipped" / "global_step8").glob("*_optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    process = job.start(hosts, folder, "--save", "flipped", "--load", "flipped", ranks=1, local=True)
    output = job.finish(process)
    assert process.returncode == 0, output
    assert f"{shard.relative_to(folder)}: its sha256 is not the one that was written" in output
    assert "flipped/global_step4_universal: a checkpoint for any number of ranks" in output
    assert "ranks before: 2, now: 1; train_batch_size stays 4, in 2 micro-batches a rank" in output
    found, expected = losses(folder / "flipped"), losses(reference)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-3) for step in expected)
