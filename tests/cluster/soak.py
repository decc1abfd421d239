# SPDX-License-Identifier: Apache-2.0
"""Kill a job on two hosts at random moments, again and again, start it anew each time, and compare its end.

    python tests/cluster/soak.py --kills 50

What is killed is a rank, all Python of one host or of both, at a moment that chance names: in the start, or in a step,
saving included. The run must end as the one that nothing disturbed: every loss and every bit of the last checkpoint.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import job
import launch
from hosts import Hosts

STEPS_PER_KILL = 14
"""On average between two kills, a little more than they come to; checkpoints are two steps apart."""
VICTIMS = {"rank 0": ([0], "--local_rank=0"), "rank 1": ([1], "--local_rank=0")}
VICTIMS |= {"all of h0": ([0], "python"), "all of h1": ([1], "python"), "all of both hosts": ([0, 1], "python")}
"""What is killed: on these hosts, every process whose command line has this in it."""
START_SHARE = 0.2
"""Of the kills in the seconds before the first step."""


def soak(hosts: Hosts, folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> None:
    """Kill and restart until the run has ended; then compare.

    Raises:
        AssertionError: a start did not continue where it should, or the run ended otherwise than the undisturbed one.
    """
    chance = random.Random(seed)
    steps = (kills + 1) * STEPS_PER_KILL
    job.write_recipe(folder, steps=steps, batch=4, micro_batch=2, timeout=60, save_interval=2)
    process = job.start(hosts, folder, "--save", "reference", ranks=2)
    output = job.finish(process)
    assert process.returncode == 0, output
    say(f"undisturbed: {steps} steps, a checkpoint every 2")
    for number in range(1, kills + 1):
        say(f"{number:3} {one_kill(hosts, folder, chance, begin=job.saved_step(folder / 'soak'), end=steps - 1)}")
    process = job.start(hosts, folder, "--save", "soak", "--load", "soak", ranks=2)
    output = job.finish(process)
    assert process.returncode == 0 and "continuing from step" in output, output
    launch.assert_same_run(folder / "soak", folder / "reference")
    say(f"{kills} kills, {kills} resumes; {steps} losses and every tensor of the last checkpoint are those undisturbed")


def one_kill(hosts: Hosts, folder: Path, chance: random.Random, *, begin: int, end: int) -> str:
    """Start, kill at a moment of chance's choice, and wait until all have ended; a line that says what happened."""
    victim, save = chance.choice(list(VICTIMS)), folder / "soak"
    target, early, pause = begin + chance.randint(1, STEPS_PER_KILL), chance.random(), chance.random()
    start = time.time()
    process = job.start(hosts, folder, "--save", "soak", "--load", "soak", ranks=2)
    if early < START_SHARE:
        job.wait_until(lambda: hosts.processes(0, "--local_rank=0") and hosts.processes(1, "--local_rank=0"), process)
        time.sleep(10 * pause)
    else:
        # The step's line may be there already from before the last kill; beginning takes it away.
        job.wait_until(lambda: (save / "run.json").exists() and (save / "run.json").stat().st_mtime > start, process)
        job.wait_for_step(process, save, min(target, end))
        time.sleep(0.3 * pause)
    reached, killed = max(launch.losses(save), default=0), time.time()
    places, pattern = VICTIMS[victim]
    for process_there in (found for place in places for found in hosts.processes(place, pattern)):
        process_there.kill()
    output = job.finish(process)
    job.wait_until(lambda: not any(hosts.processes(place, "pretrain_gpt.py") for place in (0, 1)))
    assert process.returncode != 0, output
    return (
        f"{killed - start:3.0f} s after the start, after step {reached:3}: {victim:17} killed; all ended "
        f"{time.time() - killed:4.1f} s later; the newest checkpoint is of step {job.saved_step(save)}"
    )


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
