# SPDX-License-Identifier: Apache-2.0
"""The laboratory with the real trainer: a study done, stopped in every way, shared by processes, run as an array."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import REPOSITORY, losses, prepare_text

from merit_ds.lab.attempts import is_locked, try_lock

RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: tiny.json, train_tokens: 1, eval_sequences: 6}
"""
DEEPSPEED = {
    "zero_optimization": {"stage": 1},
    "tensorboard": {"enabled": True},
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}
STUDY = """
base: tiny.yaml
tokens: 1280
micro_batch: 4
optimizers:
  MERIT: {type: Merit}
  MERIT without clip: {type: Merit, params: {clip: null}, lr_of: MERIT}
  unknown: {type: Nope}
grids:
  - {name: coarse, optimizer: [MERIT], batch: [8], lr: [0.02, 3e38]}
  - {name: failing, optimizer: [unknown], batch: [8], lr: [1]}
  - {name: ablations, optimizer: [MERIT without clip], batch: [8], lr: best}
"""
LONG = """
base: tiny.yaml
tokens: 40_960
micro_batch: 4
evaluations: 6
checkpoints: 32
optimizers: {MERIT: {type: Merit}}
grids: [{name: one, optimizer: [MERIT], batch: [8], lr: [0.02]}]
"""
BROKEN = STUDY.replace("lr: [0.02, 3e38]", "lr: [0.02]").replace("type: Nope", "type: Adam").replace("[1]", "[1, 2, 3]")
PAIR = STUDY.replace("lr: [0.02, 3e38]", "lr: [0.02], seed: [1, 2]").split("  - {name: failing")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Studies, their recipe, and data: real English from the licence."""
    path = tmp_path_factory.mktemp("lab")
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "tiny.json").write_text(json.dumps(DEEPSPEED))
    for name, text in (("study", STUDY), ("long", LONG), ("pair", PAIR), ("broken", BROKEN)):
        (path / f"{name}.yaml").write_text(text)
    prepare_text(path)
    return path


def command(name, output, *arguments, data="data"):
    given = ["--data", data, "--output", output, "--script", str(REPOSITORY / "pretrain_gpt.py"), *arguments]
    return [sys.executable, "-m", "merit_ds.lab", "run", f"{name}.yaml", *given]


def lab(folder, name, output, *arguments, **options):
    return subprocess.run(
        command(name, output, *arguments, **options),
        cwd=folder,
        text=True,
        capture_output=True,
        env=environment(),
        timeout=400,
    )


def environment():
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}


def results(output):
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def attempts(run):
    return sum("start" in json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def done(folder):
    """The finished study's folder and what was printed."""
    finished = lab(folder, "study", "done", "--jobs", "2")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "done", finished.stdout


def test_every_outcome_is_a_result(done):
    output, printed = done
    rows = results(output)
    copy = (output / "study.yaml").read_text()
    assert (
        copy
        == "# A copy by merit_ds.lab: `base` is relative to the folder of the study itself, not to this one.\n" + STUDY
    )
    assert {id_: row["status"] for id_, row in rows.items()} == {
        "MERIT-b8-lr0.02-s1": "done",
        "MERIT-b8-lr3e+38-s1": "diverged",
        "MERIT_without_clip-b8-lr0.02-s1": "done",
        "unknown-b8-lr1-s1": "failed",
    }
    good = rows["MERIT-b8-lr0.02-s1"]
    curve = [json.loads(line) for line in (output / good["folder"] / "metrics.jsonl").read_text().splitlines()]
    valid = {row["iteration"]: row["valid_loss"] for row in curve if "valid_loss" in row}
    assert good["final_valid_loss"] == valid[5] and good["best_valid_loss"] == min(valid.values())
    assert good["initial_valid_loss"] == valid[0] and sorted(losses(output / good["folder"])) == [1, 2, 3, 4, 5]
    # The loss comes first, so no kill between the two can lose it.
    log = (output / good["folder"] / "log.txt").read_text()
    assert 0 < log.index("validation loss at iteration 5") < log.index("saved checkpoint global_step5")
    assert good["steps"] == 5 and good["wall_seconds"] > 1 and 0 < good["seconds_per_step"] < 5
    assert good["git"] and good["versions"]["torch"] and good["device"].startswith("cpu")
    assert rows["MERIT_without_clip-b8-lr0.02-s1"]["point"] == good["point"] | {
        "ablation": "MERIT without clip",
        "grid": "ablations",
    }
    assert rows["MERIT-b8-lr3e+38-s1"]["final_valid_loss"] is None
    assert "Nope" in rows["unknown-b8-lr1-s1"]["reason"]
    (tuning, _) = json.loads((output / "tuning.json").read_text())
    assert tuning["best"] == 0.02 and tuning["edge"] == "low" and tuning["losses"]["3e+38"] == "inf"
    assert "the best learning rate 0.02 is the lowest of 0.02, 3e+38" in printed


def test_what_is_kept_names_no_folder_of_this_machine(done, tmp_path):
    """Nor the corpus, nor the host: what git takes of a study's folder can be published. No checkpoint is left."""
    output, _ = done
    git = ["git", f"--git-dir={tmp_path / 'git'}", f"--work-tree={output}"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True, cwd=output)
    names = subprocess.run(
        [*git, "ls-files"], check=True, cwd=output, capture_output=True, text=True
    ).stdout.splitlines()
    kinds = {Path(name).name for name in names}
    assert kinds == {
        *(".gitignore", "study.yaml", "data.json", "results.jsonl", "tuning.json"),
        *("recipe.yaml", "deepspeed.json", "run.json", "metrics.jsonl", "telemetry.jsonl"),
        *("loss.png", "result.json"),
    }
    forbidden = [str(output.parent), str(REPOSITORY), sys.prefix, str(Path.home()) + "/", socket.getfqdn() + "."]
    for name in names:
        content = (output / name).read_bytes()
        assert not [text for text in forbidden if text.encode() in content], name
    assert not list(output.rglob("global_step*")) and not list(output.rglob("latest"))


def test_a_finished_study_is_not_repeated_and_its_failures_on_request_alone(folder, done):
    before = {path: path.stat().st_mtime_ns for path in done[0].rglob("result.json")}
    again = lab(folder, "study", "done")
    assert again.returncode == 0 and "started" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in done[0].rglob("result.json")} == before
    retried = lab(folder, "study", "done", "--retry-failed", "--only", "failing")
    assert re.findall(r"started +(\S+),", retried.stdout) == ["unknown-b8-lr1-s1"], retried.stdout
    status = subprocess.run(
        [sys.executable, "-m", "merit_ds.lab", "status", "done"], cwd=folder, text=True, capture_output=True, check=True
    )
    assert "grid coarse: 1 done, 1 diverged" in status.stdout and "0.02: 5." in status.stdout


def test_results_of_another_study_or_corpus_are_not_mixed(folder, done):
    (folder / "changed.yaml").write_text(
        STUDY.replace("MERIT: {type: Merit}", "MERIT: {type: Merit, params: {eps: 0.1}}")
    )
    changed = lab(folder, "changed", "done")
    assert changed.returncode == 1 and not changed.stdout
    assert "deepspeed.json: optimizer.params.eps was None and is 0.1 now" in changed.stderr
    assert changed.stderr.count("\n") == 1 and results(done[0])
    (folder / "other").mkdir()
    arguments = [
        "text",
        str(REPOSITORY / "README.md"),
        "--output",
        "other/data",
        "--tokenizer",
        "byte",
        "--blank-lines",
    ]
    subprocess.run([sys.executable, "-m", "merit_ds.training.data", *arguments], cwd=folder, check=True)
    other = lab(folder, "study", "done", data="other/data")
    assert other.returncode == 1 and "holds results on other data than other/data" in other.stderr


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_study_that_is_stopped_or_killed_goes_on_and_comes_to_the_same_end(folder):
    """By a signal to the lab; by kill -9 of the lab, whose trainer goes on; by kill -9 of a trainer."""
    whole = lab(folder, "long", "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    (id_,) = results(folder / "whole")
    run = folder / "cut" / "runs" / id_

    def start():
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command("long", "cut"), cwd=folder, text=True, stdout=pipe, stderr=pipe, env=environment()
        )

    def last():
        return max(losses(run), default=0)

    def checkpoint():
        return int((run / "latest").read_text().removeprefix("global_step")) if (run / "latest").exists() else 0

    first = start()
    wait_for(lambda: last() > 12, first)
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=100)[0]
    assert first.returncode == 1 and "run the same command to go on" in printed
    stopped = checkpoint()
    assert 12 < stopped < 160 and not (run / "result.json").exists() and not is_locked(run)

    second = start()
    wait_for(lambda: checkpoint() > stopped + 10, second)
    second.kill()
    second.communicate()
    assert is_locked(run)
    third = start()  # finds the run taken by the trainer of the second, and waits for it
    at = checkpoint()
    wait_for(lambda: checkpoint() > at, third)
    assert attempts(run) == 2
    kill_trainer(run)
    wait_for(lambda: attempts(run) == 3 and checkpoint() > at + 10, third)
    kill_trainer(run)
    printed = third.communicate(timeout=100)[0]
    assert third.returncode == 1 and f"stopped   {id_} by SIGKILL" in printed and not (run / "result.json").exists()

    last_part = lab(folder, "long", "cut")
    assert last_part.returncode == 0, last_part.stdout + last_part.stderr
    assert attempts(run) == 4 and (run / "log.txt").read_text().count("continuing from step") == 3
    assert losses(run) == losses(folder / "whole" / "runs" / id_)
    ours, reference = results(folder / "cut")[id_], results(folder / "whole")[id_]
    for key in ("final_valid_loss", "best_valid_loss", "initial_valid_loss", "steps", "status"):
        assert ours[key] == reference[key]


def kill_trainer(run):
    (trainer,) = [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(run) and "recipe.yaml" in process.info["cmdline"]
    ]
    trainer.kill()


def test_a_stop_during_a_build_leaves_no_lock_on_which_every_later_run_fails(folder, tmp_path):
    """DeepSpeed's communication op is being compiled, for the first time, when the lab is stopped."""
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command("long", "build"), cwd=folder, env=variables, text=True, stdout=pipe, stderr=pipe)
    wait_for(lambda: list(tmp_path.glob("*/lock")), process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "stopped   MERIT-b8-lr0.02-s1 by SIGTERM" in printed
    assert list(tmp_path.glob("*/build.ninja")) and not list(tmp_path.glob("*/lock"))


def test_runs_that_the_machine_fails_are_no_results(folder, tmp_path):
    """The corpus loses its end after it was prepared: not a word about any optimizer."""
    for path in folder.glob("data*"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:-2] if path.name == "data_train.bin" else content)
    broken = lab(folder, "broken", "broken", "--jobs", "2", data=str(tmp_path / "data"))
    assert broken.returncode == 1 and "taken back: " in broken.stdout, broken.stdout
    assert broken.stdout.count("corpus_train.bin: ") >= 3
    assert not list((folder / "broken").rglob("result.json")) and not results(folder / "broken")


no_slurm = pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is an sbatch, which would submit")


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


def test_a_terminal_shows_one_block_that_is_drawn_anew(folder):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command("pair", "terminal", "--only", "*-s1"), cwd=folder, stdout=follower, env=environment()
    )
    os.close(follower)
    printed = b""
    try:
        while part := os.read(leader, 4096):
            printed += part
    except OSError:  # the terminal's other side is closed
        pass
    assert process.wait(timeout=60) == 0
    text = printed.decode()
    assert "0 done, 1 running, 0 to do" in text and "] 0/5  MERIT-b8-lr0.02-s1" in text
    # Each block is erased before the next is drawn, and none is left at the end.
    assert text.count("MERIT-b8-lr0.02-s1  ") == len(re.findall(r"\x1b\[2F\x1b\[J", text)) >= 2
    assert "done      MERIT-b8-lr0.02-s1: validation loss 5." in text


def test_a_lock_is_held_by_whoever_inherited_it(tmp_path):
    lock = try_lock(tmp_path)
    assert lock is not None and try_lock(tmp_path) is None
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    os.close(lock)
    assert is_locked(tmp_path)
    child.kill()
    child.wait()
    assert not is_locked(tmp_path)
