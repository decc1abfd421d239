# SPDX-License-Identifier: Apache-2.0
"""A study's runs as a Slurm array: one task for each run that can be started now.

Each task is `python -m merit_ds.lab run ... --only ID`, as safe to kill, requeue or submit twice as a run here.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from merit_ds.errors import InputError
from merit_ds.training.manifest import write_text

CORES = 8
"""CPU cores that a task gets for each rank."""
SHORT = {"-N": "--nodes", "-n": "--ntasks", "-c": "--cpus-per-task", "-G": "--gpus"}
GPU_OPTIONS = ("--gpus", "--gres", "--gpus-per-node", "--gpus-per-task", "--gpus-per-socket")


def resources(ranks: int, *, gpus: bool, options: list[str]) -> list[str]:
    """What a task asks for, one node with a GPU for each rank, but for what `options` ask for themselves.

    Args:
        gpus: whether the runs are on GPUs.
        options: sbatch options, which win.
    """
    names = [re.split("[= ]", option)[0] for option in options]
    given = {SHORT.get(name[:2], name) for name in names}
    wanted = {"--nodes": 1, "--ntasks": 1, "--cpus-per-task": CORES * ranks}
    if gpus and not given & set(GPU_OPTIONS):
        wanted["--gpus-per-node"] = ranks
    return [f"{name}={count}" for name, count in wanted.items() if name not in given]


def write_array(output: Path, ids: list[str], *, command: list[str], options: list[str]) -> Path:
    """Write `slurm/array-N.sh` and, beside it, the list of its tasks' runs.

    Args:
        output: the study's folder.
        ids: of the runs, one task each.
        command: arguments of `python -m merit_ds.lab` without --only; paths are relative to the folder of submission.
        options: sbatch options, `resources` among them.

    Returns:
        The script's path.
    """
    folder = output / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("array-*.sh")))
    script, tasks = folder / f"array-{number}.sh", folder / f"array-{number}.txt"
    lines = [
        f"--job-name={output.name}",
        f"--array=0-{len(ids) - 1}",
        f"--output={folder}/array-{number}_%a.log",
        "--signal=B:TERM@120",  # two minutes before the time limit: the run saves a checkpoint
        *options,
    ]
    python = [sys.executable, "-m", "merit_ds.lab", *command]
    write_text(tasks, "".join(f"{id_}\n" for id_ in ids))
    write_text(
        script,
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {line}\n" for line in lines)
        + 'cd "${SLURM_SUBMIT_DIR:-.}" || exit 1\n'
        + f'id=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(tasks))})\n'
        + f'exec {shlex.join(python)} --only "$id"\n',
    )
    return script


def submit(script: Path) -> str | None:
    """Hand the script to sbatch; returns the job's number, or None where there is no sbatch.

    Raises:
        InputError: sbatch refuses it.
    """
    if shutil.which("sbatch") is None:
        return None
    finished = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if finished.returncode:
        raise InputError(f"{script}: sbatch says: {' '.join(finished.stderr.split())}")
    return finished.stdout.strip()
