"""How a run was made, in its files: the git revision, and every start of a run that was continued."""

import json
import subprocess
import threading
from pathlib import Path

import pytest

from merit_ds.errors import InputError
from merit_ds.training import report
from merit_ds.training.manifest import write_text
from merit_ds.training.report import RunFolder, _git_revision


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A checkout with a package and a study in it, one commit."""
    for file in ("package/__init__.py", "studies/tuning.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package", "studies")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path / "package"


def test_a_study_in_the_checkout_does_not_make_the_code_dirty(package: Path) -> None:
    commit = git(package, "rev-parse", "--short", "HEAD")
    (package.parent / "studies/tuning.json").write_text("more runs\n")
    (package.parent / "studies/new.jsonl").write_text("a result\n")
    assert _git_revision(package) == commit


@pytest.mark.parametrize("file", ["__init__.py", "new.py"])
def test_a_changed_or_a_new_file_of_the_package_does(package: Path, file: str) -> None:
    commit = git(package, "rev-parse", "--short", "HEAD")
    (package / file).write_text("changed\n")
    assert _git_revision(package) == f"{commit}-dirty"


def test_another_projects_checkout_is_not_ours(package: Path) -> None:
    """A virtual environment in a project's folder: its commit says nothing about what is installed there."""
    installed = package.parent / ".venv/site-packages/merit_ds"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("installed\n")
    assert _git_revision(installed) is None
    assert _git_revision(Path("/")) is None


def test_each_start_that_a_runs_steps_go_back_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start at step 8 is forgotten by a run that goes on from step 6."""
    for step, revision in ((0, "a"), (4, "b"), (8, "c"), (6, "d")):
        monkeypatch.setattr(report, "_git_revision", lambda found=revision: found)
        RunFolder(tmp_path).begin({"config": {}}, step=step)
    run = json.loads((tmp_path / "run.json").read_text())
    assert [(start["step"], start["git"]) for start in run["starts"]] == [(0, "a"), (4, "b"), (6, "d")]
    assert run["git"] == "d" and run["starts"][0]["versions"]["torch"]
    monkeypatch.undo()
    RunFolder(tmp_path).begin({}, step=0)
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [0]
    (tmp_path / "run.json").write_text("{")
    RunFolder(tmp_path).begin({}, step=2)
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [2]


def test_a_run_folder_is_shared_where_it_appears_later(tmp_path: Path) -> None:
    """An NFS client goes on saying for up to a minute that there is no such folder, or shows the file before."""
    there, here = RunFolder(tmp_path / "there"), RunFolder(tmp_path / "here")
    text = there.begin({}, step=0)
    threading.Timer(0.5, lambda: there.path.rename(here.path)).start()
    here.check_shared(text)
    other = text.replace("versions", "others")
    with pytest.raises(InputError, match="here is not the folder that rank 0 writes to: on several hosts share one"):
        here.check_shared(other, seconds=0.1)
    threading.Timer(0.5, lambda: write_text(here.path / "run.json", other)).start()
    here.check_shared(other)
