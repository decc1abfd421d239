# SPDX-License-Identifier: Apache-2.0
"""The laboratory with the real trainer: a study done, not repeated, not mixed; what one sees."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lab_case import (
    STUDY,
    command,
    environment,
    lab,
    results,
    write_studies,
)
from launch import REPOSITORY, losses

from merit_ds.lab.attempts import is_locked, try_lock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_studies(tmp_path_factory.mktemp("lab"))


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
    listed = lab(folder, "study", "done", "--retry-failed", "--dry-run")
    assert re.findall(r"^(\S+) +\d+ steps", listed.stdout, re.MULTILINE) == ["unknown-b8-lr1-s1"]
    others = lab(folder, "study", "done", "--retry-failed", "--only", "coarse")
    assert others.returncode == 0 and "started" not in others.stdout
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
    for options in ([], ["--dry-run"]):
        other = lab(folder, "study", "done", *options, data="other/data")
        assert other.returncode == 1 and "holds results on other data than other/data" in other.stderr


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
