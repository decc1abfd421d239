# SPDX-License-Identifier: Apache-2.0
"""Where a run saves to and continues from; how an error ends a command: its lines, and its status."""

import argparse
import sys
from pathlib import Path

import pytest

from merit_ds.errors import InputError, TransientError, UnsupportedError
from merit_ds.training.cli import add_arguments, report_errors, resolve_config


def ended(error: BaseException, cause: BaseException | None = None) -> int:
    """The exit status of a command that raises it."""
    with pytest.raises(SystemExit) as stopped, report_errors():
        try:
            if cause is not None:
                raise cause
        except BaseException as found:
            raise error from found
        raise error
    return int(str(stopped.value.code))


@pytest.mark.parametrize("cause", [None, OSError("full"), InputError("inner"), UnsupportedError("stage 3")])
def test_an_explained_error_is_one_line_of_one_rank_of_each_host(
    cause: BaseException | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", "error: it does not fit\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ended(InputError("it does not fit"), cause) == 1
        assert capsys.readouterr().err == lines


def test_a_fault_beneath_an_error_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rank that has it, whatever its number."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    inner = InputError("cannot convert it")
    inner.__cause__ = AttributeError("no attribute 'flta'")
    assert ended(InputError("DeepSpeed does not accept it"), inner) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: DeepSpeed does not accept it"
    assert lines[-1] == "AttributeError: no attribute 'flta'"


def test_what_may_go_well_at_another_time_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(TransientError("the disk is full")) == 75
    assert capsys.readouterr().err == "error: the disk is full\n"


RECIPE = """
model: {num_layers: 2, hidden_size: 36, num_attention_heads: 3}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: ds.json, train_tokens: 10240%s}
"""
LAUNCHER = ["--default-save", "default", "--resume"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "save", "load"),
    [
        ("", [], None, None),
        ("", ["--resume"], None, None),
        ("", LAUNCHER, "default", "default"),
        (", save: yaml", LAUNCHER, "yaml", "yaml"),
        (", save: yaml", [*LAUNCHER, "--save", "other"], "other", "other"),
        (", save: yaml", [*LAUNCHER, "--set", "run.save=set"], "set", "set"),
        ("", [*LAUNCHER, "--set", "run.save=null"], None, None),
        ("", [*LAUNCHER, "--load", "another"], "default", "another"),
    ],
)
def test_where_a_run_saves_to_and_continues_from(
    tmp_path: Path, recipe: str, arguments: list[str], save: str | None, load: str | None
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % recipe)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run = resolve_config(parser.parse_args(["--config", str(path), *arguments])).run
    assert (run.save, run.load) == (save, load)
