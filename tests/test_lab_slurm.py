# SPDX-License-Identifier: Apache-2.0
"""A study as a Slurm array: its script run by bash as Slurm would."""

import shutil
import subprocess

import pytest
from lab_case import attempts, command, environment, lab, results, write_studies

no_slurm = pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is an sbatch, which would submit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_studies(tmp_path_factory.mktemp("lab"))


@no_slurm
def test_an_array_of_tasks_does_each_run_once(folder):
    """The script that --slurm writes, run by bash as Slurm would, one task twice at the same time; on two ranks."""
    planned = lab(folder, "pair", "array", "--slurm", "--sbatch=--time=1:00", "--ranks", "2")
    assert planned.returncode == 0 and "array/slurm/array-1.sh holds 2 runs; there is no sbatch here" in planned.stdout
    script = (folder / "array/slurm/array-1.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --time=1:00\n" in script
    assert "#SBATCH --cpus-per-task=16\n" in script and "gpu" not in script

    def task(number):
        variables = environment() | {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_SUBMIT_DIR": str(folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", "array/slurm/array-1.sh"], cwd=folder, env=variables, text=True, stdout=pipe, stderr=pipe
        )

    tasks = [task(0), task(0), task(1)]
    printed = ["".join(process.communicate(timeout=300)) for process in tasks]
    assert sorted(process.returncode for process in tasks) == [0, 0, 0], printed
    assert sum("another process has it" in text for text in printed) == 1, printed
    rows = results(folder / "array")
    assert [row["status"] for row in rows.values()] == ["done", "done"] and {row["ranks"] for row in rows.values()} == {
        2
    }
    assert [attempts(folder / "array" / row["folder"]) for row in rows.values()] == [1, 1]
    nothing = lab(folder, "pair", "array", "--slurm", "--ranks", "2")
    assert "nothing to submit" in nothing.stdout


@no_slurm
def test_a_task_that_was_to_have_gpus_does_not_start_without(folder):
    variables = environment() | {"CUDA_VISIBLE_DEVICES": "", "SLURM_ARRAY_TASK_ID": "1"}
    del variables["DS_ACCELERATOR"]
    run = {"cwd": folder, "env": variables, "text": True, "capture_output": True, "timeout": 200}
    planned = subprocess.run(command("pair", "gpus", "--slurm"), **run)
    assert planned.returncode == 0, planned.stderr
    assert "#SBATCH --gpus-per-node=1\n" in (folder / "gpus/slurm/array-1.sh").read_text()
    task = subprocess.run(["bash", "gpus/slurm/array-1.sh"], **run)
    assert task.returncode == 1 and "error: --need-gpus: no GPU is visible here" in task.stderr
    assert task.stderr.count("\n") == 1 and not (folder / "gpus/runs").exists()
