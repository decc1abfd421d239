# SPDX-License-Identifier: Apache-2.0
"""Telemetry of real runs of the trainer: sharded, split, on, off; its file and DeepSpeed's monitors."""

import csv
import json
from pathlib import Path
from typing import Any

import launch
import pytest
from matplotlib.figure import Figure
from ranks import run_ranks
from tensor_parallel_cases import CONTEXT, Run, Split, train_run

from merit_ds.telemetry.__main__ import main
from merit_ds.telemetry.plots import draw_attention_map, draw_layers, draw_weights
from merit_ds.telemetry.sampler import events
from merit_ds.telemetry.values import OF_ATTENTION, OF_UPDATES, OF_WEIGHTS, VALUES
from merit_ds.training.report import RunFolder

STEPS = 5
RECIPE = f"""
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: {CONTEXT}}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: alone/deepspeed.json, train_tokens: {STEPS * 8 * CONTEXT}, eval_interval: 2, eval_sequences: 6,
      save_interval: 2}}
telemetry: {{interval: 2}}
"""
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Merit", "params": {"lr": 0.02}},
    "csv_monitor": {"enabled": True},
}
RUNS = {
    "alone": (8, {}, Split()),
    "zero2": (4, {"zero_optimization": {"stage": 2}}, Split()),
    "off": (4, {"zero_optimization": {"stage": 2}}, Split()),
    "recomputed": (4, {"zero_optimization": {"stage": 1}}, Split(recompute=True)),
    "split": (8, {"zero_optimization": {"stage": 1}}, Split(2, sequence=True)),
    "adamw": (4, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}, Split()),
}


def train_all(rank: int, folder: Path, names: list[str]) -> None:
    for name in names:
        settings = ["telemetry.interval=0"] if name == "off" else []
        train_run(Run(name, RUNS[name][2], steps=STEPS), folder, *settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every run has been trained."""
    path = tmp_path_factory.mktemp("telemetry")
    (path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(path)
    for name, (micro_batch, changes, _) in RUNS.items():
        (path / name).mkdir()
        settings = DEEPSPEED | {"train_micro_batch_size_per_gpu": micro_batch} | changes
        (path / name / "deepspeed.json").write_text(json.dumps(settings))
    run_ranks(1, train_all, path, ["alone"])
    run_ranks(2, train_all, path, [name for name in RUNS if name != "alone"])
    return path


def rows(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "telemetry.jsonl").read_text().split("\n")[:-1]]


def flat(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value, _ in events(row, samples=0)}


@pytest.mark.parametrize("name", ["zero2", "recomputed", "split"])
def test_what_several_ranks_find_is_what_one_finds(folder, name):
    """In the first step but for the order of sums; later the weights have drifted apart by that."""
    for found, expected in zip(rows(folder / name), rows(folder / "alone"), strict=True):
        assert found["iteration"] == expected["iteration"]
        assert set(found) == {"iteration", "elements", *VALUES} and found["elements"] == expected["elements"]
        tolerance = 1e-5 if found["iteration"] == 1 else 1e-2
        assert flat(found) == pytest.approx(flat(expected), rel=tolerance, abs=tolerance / 10)


def test_the_first_step_and_every_second_one_are_sampled(folder):
    assert [row["iteration"] for row in rows(folder / "zero2")] == [1, 2, 4]
    assert all(len(row[value]) == 2 for row in rows(folder / "zero2") for value in OF_ATTENTION)


def test_a_run_is_bitwise_the_same_without(folder):
    launch.assert_same_run(folder / "zero2", folder / "off")
    assert not (folder / "off" / "telemetry.jsonl").exists()
    assert not list((folder / "off" / "csv_monitor").glob("*Telemetry*"))


def test_an_optimizer_without_ratios_leaves_theirs_out(folder):
    for row in rows(folder / "adamw"):
        assert set(row) == {"iteration"} | OF_ATTENTION | OF_WEIGHTS


def test_the_monitor_gets_every_number(folder):
    """At the samples consumed, as DeepSpeed counts."""
    found = {}
    for path in (folder / "zero2" / "csv_monitor").glob("Telemetry_*.csv"):
        header, *lines = csv.reader(path.open())
        assert header[0] == "step"
        found[path.stem] = [(int(samples), float(value)) for samples, value in lines]
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows(folder / "zero2"):
        for name, value in flat(row).items():
            wanted.setdefault(name.replace("/", "_"), []).append((8 * row["iteration"], value))
    assert found == wanted
    assert "Telemetry_max_attention_logit_layer_01" in found
    assert "Telemetry_l2_max_gap_decoder.layers.0.self_attention.linear_qkv.weight.query" in found


def test_a_continued_run_drops_what_it_will_do_again(tmp_path):
    folder = RunFolder(tmp_path)
    for file in (folder.metrics, folder.telemetry):
        file.write_text('{"iteration": 1}\n{"iteration": 4}\n{"itera')
    folder.begin({}, step=2)
    assert rows(tmp_path) == folder.rows() == [{"iteration": 1}]
    folder.begin({}, step=0)
    assert rows(tmp_path) == folder.rows() == []


def test_the_pictures_show_the_rows(folder):
    found = rows(folder / "alone")
    axes = Figure().subplots()
    draw_layers(found, axes, value="attention_entropy", title="")
    for layer, line in enumerate(axes.lines):
        assert list(line.get_xdata()) == [row["iteration"] for row in found]
        assert list(line.get_ydata()) == [row["attention_entropy"][layer] for row in found]
    axes = Figure().subplots()
    draw_attention_map(found, axes, title="")
    assert axes.collections[0].get_array().T.tolist() == [row["max_attention_logit"] for row in found]
    figure = Figure()
    draw_weights(found, figure, value="ratios", title="")
    panel = next(axes for axes in figure.axes if axes.get_title() == "mlp.linear_fc1")
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert list(panel.lines[1].get_ydata()) == [row["ratios"][name][1] for row in found]
    band = panel.collections[1].get_paths()[0].vertices[:, 1]
    assert {band.min(), band.max()} == {
        min(row["ratios"][name][0] for row in found),
        max(row["ratios"][name][2] for row in found),
    }


def test_the_command_draws_every_value(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["telemetry", str(folder / "alone"), str(folder / "adamw")])
    main()
    drawn = {path.stem for path in (folder / "alone" / "telemetry").glob("*.png")}
    assert drawn == {"attention_map", *VALUES}
    assert {path.stem for path in (folder / "adamw" / "telemetry").glob("*.png")} == drawn - OF_UPDATES
    monkeypatch.setattr("sys.argv", ["telemetry", str(folder / "off")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert f"error: {folder / 'off' / 'telemetry.jsonl'}: no samples there" in capsys.readouterr().err
