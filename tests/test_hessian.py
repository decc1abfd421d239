# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.telemetry.hessian`, for real runs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
from planted import plant

from merit_ds.telemetry.hessian import FORMAT, main
from merit_ds.training.checkpoint_folder import read_checkpoints
from merit_ds.training.manifest import write_manifest
from merit_ds.training.universal import make_universal

RECIPE = """
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, seq_length: 16, activation_checkpointing: true}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: merit.json, train_tokens: 1536, eval_interval: 100, eval_sequences: 6, save_interval: 6, seed: 5}
"""
DEEPSPEED = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
MERIT = {"type": "Merit", "params": {"lr": 0.02}}
RUNS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "adamw": ({"optimizer": ADAMW}, 0, ()),
    "merit": ({"optimizer": MERIT, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, 0, ()),
    "split": ({"optimizer": MERIT}, 2, ("--set", "model.tensor_parallel=2", "--set", "model.sequence_parallel=true")),
}
"""By name: the JSON's changes, ranks (0: plain python), arguments. 12 steps each, checkpoints of steps 6 and 12."""
OPTIONS = ("--sequences", "6", "--lanczos", "12", "--trace-probes", "3", "--seed", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the real trainer, on the licence's English."""
    path = tmp_path_factory.mktemp("hessian")
    (path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(path)
    for name, (changes, ranks, arguments) in RUNS.items():
        (path / f"{name}.json").write_text(json.dumps(DEEPSPEED | changes))
        given = ("--save", name, "--deepspeed_config", f"{name}.json", *arguments)
        finished = launch.run(path, *given, ranks=ranks)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return path


@pytest.fixture(autouse=True)
def _within(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's paths are relative to where the run was started."""
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


def valid_loss(name: str) -> float:
    return float(next(row["valid_loss"] for row in launch.metrics(Path(name))[::-1] if "valid_loss" in row))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="1"):
        main([*OPTIONS, *arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_the_command_measures_the_runs_own_validation_loss(folder: Path) -> None:
    command = [sys.executable, "-m", "merit_ds.telemetry.hessian", "adamw", *OPTIONS]
    finished = subprocess.run(command, env=launch.environment(), text=True, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert "adamw/hessian_step12.json" in finished.stdout and "adamw/hessian_step12.png" in finished.stdout
    assert "14/14" in finished.stderr  # 12 products for the density, 2 more for the trace
    assert Path("adamw/hessian_step12.png").read_bytes().startswith(b"\x89PNG")
    text = Path("adamw/hessian_step12.json").read_text()
    assert str(folder) not in text and os.sep + "tmp" not in text
    result = json.loads(text)
    assert result["loss"] == pytest.approx(valid_loss("adamw"), rel=1e-6)
    assert result["format"] == FORMAT and result["label"] == "AdamW, adamw, step 12"
    assert result["data"] | {"sha256": ""} == {"sha256": "", "seed": 5, "sequences": 6, "tokens": 96}
    assert result["data"]["sha256"] == json.loads(Path("data.json").read_text())["valid"]["bin"]["sha256"]
    top, (quadrature,) = result["top_eigenvalues"], result["quadratures"]
    assert top[0]["value"] == max(quadrature["nodes"]) > 0 and top[0]["residual"] < 0.01 * top[0]["value"]
    assert sum(quadrature["weights"]) == pytest.approx(1, abs=1e-9) and len(quadrature["nodes"]) == 12
    assert result["trace"]["mean"] == pytest.approx(np.mean(result["trace"]["samples"]))
    assert len(result["trace"]["samples"]) == 3 and result["trace"]["standard_error"] > 0
    assert result["made"]["versions"]["torch"] and result["checkpoint"]["name"] == "global_step12"


def test_two_runs_are_measured_alike_and_drawn_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["adamw", "merit", "--output", "both", *OPTIONS, "--micro-batch", "2"])
    adamw, merit = (json.loads(Path(f"both/{name}_step12.json").read_text()) for name in ("adamw", "merit"))
    assert Path("both/hessian.png").read_bytes().startswith(b"\x89PNG")
    assert adamw["data"] == merit["data"] and adamw["loss"] != merit["loss"]
    assert merit["checkpoint"]["weights"] == "bf16" and adamw["checkpoint"]["weights"] == "fp32"
    # The run computed this loss in bfloat16.
    assert merit["loss"] == pytest.approx(valid_loss("merit"), rel=5e-3)
    # Another micro-batch changes the rounding alone.
    main(["adamw", "--output", "alone", *OPTIONS])
    alone = json.loads(Path("alone/adamw_step12.json").read_text())
    assert alone["top_eigenvalues"][0]["value"] == pytest.approx(adamw["top_eigenvalues"][0]["value"], rel=1e-4)
    # Results in place of runs: nothing is measured again, and the picture is the same.
    capsys.readouterr()
    main(["both/adamw_step12.json", "both/merit_step12.json", "--output", "again"])
    assert "product" not in capsys.readouterr().err
    assert Path("again/hessian.png").read_bytes() == Path("both/hessian.png").read_bytes()
    assert [path.name for path in Path("again").iterdir()] == ["hessian.png"]
    others = ("both/adamw_step12.json", "merit", "--output", "never", "--sequences", "3")
    assert "sequences is 6 and 3" in refused(capsys, *others) and not Path("never").exists()


def test_a_split_run_is_measured_from_its_universal_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "split")
    assert "split over 2 ranks" in line and "merit_ds.training.universal split" in line
    make_universal(Path("split"))
    main(["split", *OPTIONS])
    result = json.loads(Path("split/hessian_step12.json").read_text())
    assert result["checkpoint"]["name"] == "global_step12_universal"
    assert result["loss"] == pytest.approx(valid_loss("split"), rel=1e-6)


def test_a_universal_checkpoint_gives_the_same(folder: Path) -> None:
    main(["merit", "--output", "shards", "--step", "12", *OPTIONS])
    make_universal(Path("merit"))
    main(["merit", "--output", "universal", *OPTIONS])
    shards, universal = (json.loads(Path(f"{name}/merit_step12.json").read_text()) for name in ("shards", "universal"))
    assert universal["checkpoint"]["weights"] == "fp32"
    # The float32 weights, which are those of the shards before they were rounded to bfloat16.
    assert universal["loss"] != shards["loss"] and universal["loss"] == pytest.approx(shards["loss"], rel=2e-3)


def test_a_step_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["adamw", "--step", "6", *OPTIONS])
    assert json.loads(Path("adamw/hessian_step6.json").read_text())["checkpoint"]["name"] == "global_step6"
    assert "no checkpoint of step 7; there are those of 6, 12" in refused(capsys, "adamw", "--step", "7")


def test_bad_input_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert "run.json: No such file" in refused(capsys, "absent")
    assert "--output DIR" in refused(capsys, "adamw", "merit")
    assert "two results would both be" in refused(capsys, "adamw", "./adamw", "--output", "never")
    assert "data.json: not a result of `python -m merit_ds.telemetry.hessian`" in refused(capsys, "data.json")
    assert "absent.json: no prepared data" in refused(capsys, "adamw", "--data", "absent")
    assert "lower --sequences" in refused(capsys, "adamw", "--sequences", "100000")
    assert "--device cuda:77: " in refused(capsys, "adamw", "--device", "cuda:77")
    assert sorted(folder.rglob("*")) == before


def test_planted_code_is_refused_and_does_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for copy in ("shared", "universal"):
        shutil.copytree("adamw", f"planted_{copy}")
    for checkpoint, name in (
        (Path("planted_shared/global_step12"), "mp_rank_00_model_states.pt"),
        (make_universal(Path("planted_universal")), "zero/decoder.final_layernorm.weight/fp32.pt"),
    ):
        made = plant(checkpoint, name)
        line = refused(capsys, str(checkpoint.parent))
        assert f"{checkpoint / name}: holds posix.mkdir: refused" in line and not made.exists()


def test_zero_3_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer writes no such checkpoint; a manifest that says so."""
    newest = read_checkpoints(Path("adamw"))[0][0]
    write_manifest(newest.path, replace(newest.manifest, zero_stage=3))
    try:
        assert "ZeRO-3" in refused(capsys, "adamw")
    finally:
        write_manifest(newest.path, newest.manifest)
