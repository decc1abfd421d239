# SPDX-License-Identifier: Apache-2.0
"""Kill a job on two hosts at random moments, again and again, start it anew each time, and compare its end.

    python tests/cluster/soak.py --kills 50

What is killed is a rank, all Python of one host or of both, at a moment that chance names: in the start, in a step, or
while a checkpoint is written. The run must end as the one that nothing disturbed: every loss, and every bit of the last
checkpoint.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import job
import launch
import psutil
from hosts import Hosts

from merit_ds.training.checkpoint_folder import UNFINISHED

STEPS_PER_KILL = 14
"""On average between two kills, a little more than they come to; checkpoints are two steps apart."""
VICTIMS = {"rank 0": ([0], "--local_rank=0"), "rank 1": ([1], "--local_rank=0")}
VICTIMS |= {"all of h0": ([0], "python"), "all of h1": ([1], "python"), "all of both hosts": ([0, 1], "python")}
"""What is killed: on these hosts, every process whose command line has this in it."""
MOMENTS = {"step": 0.6, "save": 0.2, "start": 0.2}
"""When, and how often: in a step, while a checkpoint is written, or in the seconds before the first step."""


def soak(hosts: Hosts, folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill and restart until so many starts after a kill have continued, then compare.

    Returns:
        How often a start continued from the newest checkpoint. A start that was itself killed early does not count.

    Raises:
        AssertionError: a start did not continue from the newest checkpoint, or the run ended otherwise than the
            undisturbed one.
    """
    chance = random.Random(seed)
    steps = (kills + 1) * STEPS_PER_KILL
    job.write_recipe(folder, steps=steps, batch=4, micro_batch=2, timeout=60, save_interval=2)
    process = job.start(hosts, folder, "--save", "reference", ranks=2)
    output = job.finish(process)
    assert process.returncode == 0, output
    say(f"undisturbed: {steps} steps, a checkpoint every 2")
    resumes = killed = 0
    while resumes < kills - 1:
        killed += 1
        newest = job.saved_step(folder / "soak")
        line, output = one_kill(hosts, folder, chance, begin=newest, end=steps - 1)
        resumes += continued(output, newest)
        say(f"{killed:3} {line}")
    process = job.start(hosts, folder, "--save", "soak", "--load", "soak", ranks=2)
    newest, output = job.saved_step(folder / "soak"), job.finish(process)
    assert process.returncode == 0, output
    resumes += continued(output, newest)
    launch.assert_same_run(folder / "soak", folder / "reference")
    say(
        f"{killed} kills, {resumes} starts after one that continued from the newest checkpoint, the others were killed "
        f"before; {steps} losses and every tensor of the last checkpoint are those undisturbed"
    )
    return resumes


def continued(output: str, newest: int) -> bool:
    """Whether the start got so far as to continue; then it was from the newest checkpoint."""
    found = re.search(r"continuing from step (\d+) in soak", output)
    assert found is None or int(found[1]) == newest, output
    return found is not None


def one_kill(hosts: Hosts, folder: Path, chance: random.Random, *, begin: int, end: int) -> tuple[str, str]:
    """Start, kill at a moment of chance's choice, and wait until all have ended; a line of it, and the job's output."""
    victim, save = chance.choice(list(VICTIMS)), folder / "soak"
    (moment,) = chance.choices(list(MOMENTS), list(MOMENTS.values()))
    target, pause = begin + chance.randint(1, STEPS_PER_KILL), chance.random()
    start = time.time()
    process = job.start(hosts, folder, "--save", "soak", "--load", "soak", ranks=2)
    if moment == "start":
        job.wait_until(lambda: hosts.processes(0, "--local_rank=0") and hosts.processes(1, "--local_rank=0"), process)
        time.sleep(10 * pause)
    else:
        # The step's line may be there already from before the last kill; beginning takes it away.
        job.wait_until(lambda: job.is_newer(save / "run.json", start), process)
        job.wait_for_step(process, save, min(target, end))
    found = find_victims(hosts, victim)
    if moment == "save":
        step = time.time()
        job.wait_until(
            lambda: any(job.is_newer(path, step) for path in save.glob(f"{UNFINISHED}*")), process, every=0.0005
        )
        time.sleep(0.1 * pause)
    elif moment == "step":
        time.sleep(0.3 * pause)
    reached, killed = max(launch.losses(save), default=0), time.time()
    for there in found:
        there.kill()
    output = job.finish(process)
    job.wait_until(lambda: not any(hosts.processes(place, "pretrain_gpt.py") for place in (0, 1)))
    assert process.returncode != 0, output
    line = (
        f"{killed - start:3.0f} s after the start, after step {reached:3}, in a {moment:5}: {victim:17} killed; all "
        f"ended {time.time() - killed:4.1f} s later; the newest checkpoint is of step {job.saved_step(save)}"
    )
    return line, output


def find_victims(hosts: Hosts, victim: str) -> list[psutil.Process]:
    places, pattern = VICTIMS[victim]
    return [process for place in places for process in hosts.processes(place, pattern)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    folder, bed = root / "job", root / "hosts"
    folder.mkdir()
    bed.mkdir()
    launch.prepare_text(folder)
    job.write_environment(folder)
    with Hosts(bed, 2) as hosts:
        soak(hosts, folder, kills=arguments.kills, seed=arguments.seed, say=lambda line: print(line, flush=True))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
