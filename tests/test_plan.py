# SPDX-License-Identifier: Apache-2.0
"""What `python -m merit_ds.plan` says, refuses, warns of and draws."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import megatron_alone

from merit_ds.errors import InputError
from merit_ds.plan import __main__ as command
from merit_ds.plan import report
from merit_ds.plan.curve import curve, gpu_counts
from merit_ds.plan.forecast import Forecast, forecast, on_paper
from merit_ds.plan.gpus import GPUS
from merit_ds.plan.ledger import Ledger
from merit_ds.plan.optimizers import optimizer_of
from merit_ds.plan.timing import Assumptions, Cluster, ring_bandwidth
from merit_ds.plan.wrapper import wrapper_of
from merit_ds.training.config import load_config
from merit_ds.training.deepspeed_config import read_deepspeed_json
from merit_ds.training.model import build_model, masked_mean
from merit_ds.training.plan import make_plan

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE = str(CONFIGS / "gpt2_large_8k.yaml")
H100 = GPUS["h100-80g"]


def say(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    command.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def planned(
    recipe: str, nodes: int, *, gpus: int = 8, gpu: Any = H100, overrides: Sequence[str] = (), **changes: Any
) -> Forecast:
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides=overrides)
    ds_config = read_deepspeed_json(Path(config.run.deepspeed)) | changes
    with on_paper(config, ds_config) as paper:
        return forecast(paper, ds_config, Cluster(gpu, nodes, gpus, gpu.network), Assumptions())


def test_a_page_for_people(monkeypatch, capsys):
    page = say(monkeypatch, capsys, LARGE, "--nodes", "8")
    assert "64 GPUs are valid; the nearest others are 32 and 128" in page
    assert "773.6 M trained parameters, Merit, bf16, ZeRO stage 1, BF16_Optimizer" in page
    assert "micro-batch 4 x 64 data-parallel ranks x accumulation 32" in page
    assert "8,388,608 tokens a step, 1,907 steps, 16.00 B tokens" in page
    assert "an estimate" in page and "Assumed" in page and "warning" not in page
    assert max(map(len, page.splitlines())) <= 120
    shown = (CONFIGS.parent / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page.splitlines() if ("    " + line).rstrip() not in shown] == [], "docs/plan.md shows it"


def test_all_numbers_for_machines(monkeypatch, capsys, tmp_path):
    values = json.loads(say(monkeypatch, capsys, LARGE, "--nodes", "8", "--json", "-"))
    recipe, weights = values["recipe"], values["model"]["parameters"]
    assert weights == 773_582_080  # of GPT-2 large: 36 layers of 12 h^2 + 2 h, 50,304 + 1,024 embeddings, a norm
    by_hand = {"gradients": 2 * weights, "weights": 2 * weights // 64, "flags": 4 * 31 + 12}
    found = {transfer["what"]: transfer["handed_bytes"] for transfer in recipe["transfers"]}
    assert found | by_hand == found and 0 < found["maxima"] < 0.001 * found["gradients"]
    assert recipe["memory"]["gradients"] == (4 + 2) * weights and recipe["memory"]["optimizer"] == 12 * weights // 64
    assert recipe["memory"]["total"] == sum(recipe["memory"][part] for part in report.PARTS)
    time = recipe["time"]
    assert time["total"] == pytest.approx(sum(seconds for part, seconds in time.items() if part != "total"))
    flops = values["model"]["flops_per_sequence"] * 8192
    assert time["compute"] == pytest.approx(flops / 64 / (0.4 * 989e12))
    assert recipe["mfu"] == pytest.approx(flops / 64 / time["total"] / 989e12)
    assert recipe["days"] == pytest.approx(1907 * time["total"] / 86400)
    assert [row["stage"] for row in values["stages"]] == [0, 1, 2] and values["fits"] and not values["warnings"]
    say(monkeypatch, capsys, LARGE, "--json", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text())["cluster"]["gpus"] == 8


def test_what_the_trainer_refuses_is_refused_in_its_words(monkeypatch, capsys):
    for world, overrides in ((56, []), (8, ["model.tensor_parallel=3"]), (8, ["run.train_tokens=1000"])):
        with monkeypatch.context() as patch:
            for name, value in {"WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0}.items():
                patch.setenv(name, str(value))
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", "29500")
            with pytest.raises(InputError) as trainer:
                make_plan(load_config(Path(LARGE), overrides=overrides))
        settings = [word for setting in overrides for word in ("--set", setting)]
        assert refused(monkeypatch, capsys, LARGE, "--nodes", str(world // 8), *settings) == str(trainer.value)
    assert "cannot read the recipe" in refused(monkeypatch, capsys, "none.yaml")
    for option in ("--json", "--plot"):
        assert (
            refused(monkeypatch, capsys, LARGE, option, "none/file") == f"{option} none/file: there is no folder none"
        )
        assert refused(monkeypatch, capsys, LARGE, option, str(CONFIGS)).endswith("it is a folder; name a file in it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_opt"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients false"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "bf16.immediate_grad_update"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "refuses that at stage 0"),
        ({"communication_data_type": "int8"}, "communication_data_type is 'int8'"),
    ],
)
def test_a_key_whose_effect_is_not_known_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrapper_of(changes)


def test_what_optimizers_keep_and_move():
    kept = {"Merit": (2, 40), "MeritLAMB": (2, 40), "MeritLion": (1, 20), "AdamW": (2, 28), "lion": (1, 20)}
    for kind, wanted in kept.items():
        found = optimizer_of({"optimizer": {"type": kind, "params": {"lr": 0.1}}})
        assert (found.moments, found.moved_bytes) == wanted
    scion, muon = (optimizer_of({"optimizer": {"type": kind, "params": {"lr": 1}}}) for kind in ("MeritScion", "Muon"))
    assert (scion.moments, scion.momentum, muon.momentum) == (1, "sum", "pieces")
    with pytest.raises(InputError, match=r"optimizer\.params: .*'rate'"):
        optimizer_of({"optimizer": {"type": "Merit", "params": {"rate": 1}}})
    with pytest.raises(InputError, match="'OneBitAdam': the plan knows Merit, "):
        optimizer_of({"optimizer": {"type": "OneBitAdam"}})


def test_memory_that_does_not_suffice_is_a_warning_that_says_what_would():
    small = replace(H100, memory=12 * 10**9)
    found = planned("gpt2_large_8k", 8, gpu=small)
    assert not found.fits
    (warning,) = report.warnings(found)
    assert warning.startswith(f"the recipe needs {found.recipe.memory.total / 1e9:.2f} GB of 11.04 GB")
    largest = {row.stage: row.largest for row in found.stages}
    assert largest[1] in (1, 2) and f"stage 1 micro-batch {largest[1]}" in warning
    assert f"{found.stages[1].largest} (accumulation {8192 // 64 // largest[1]})" in report.text(
        found, gpu_name="small"
    )
    nothing = planned("gpt2_large_8k", 8, gpu=replace(H100, memory=10**9))
    recomputed = planned(
        "gpt2_large_8k", 8, gpu=replace(H100, memory=10**9), overrides=["model.activation_checkpointing=true"]
    )
    assert "nothing fits: try --set model.activation_checkpointing=true" in report.warnings(nothing)[0]
    assert "nothing fits: try a larger model.tensor_parallel" in report.warnings(recomputed)[0]


def test_shares_that_are_not_negligible_are_warned_of():
    # At stage 0 every rank steps all weights, here for a single sequence.
    alone = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}, "data_types": {}}
    every_rank = report.warnings(planned("gpt2_small_1k", 128, **alone))
    assert any("the optimizer takes" in line and "ZeRO stage 1 or 2" in line for line in every_rank)
    assert not report.warnings(planned("gpt2_small_1k", 8))
    tiny = planned("quickstart", 1, gpus=2)  # a step of two milliseconds, in which every message counts
    assert any("of the data-parallel bytes, in" in line for line in report.warnings(tiny))
    assert any("a layer has 0.25 ms of work a micro-batch: launching kernels" in line for line in report.warnings(tiny))
    sliced = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "scheduler": {}}
    sharded = report.warnings(planned("gpt2_small_1k", 1, gpus=2, **sliced))
    assert any("the optimizer takes" in line and "a larger batch" in line for line in sharded)


def test_a_ring_is_as_fast_as_its_slowest_link():
    two = Cluster(H100, 2, 8, 50e9)
    assert ring_bandwidth(replace(two, nodes=1), "data", tensor_ranks=1) == 450e9
    assert ring_bandwidth(two, "data", tensor_ranks=1) == 400e9
    assert ring_bandwidth(two, "data", tensor_ranks=4) == 100e9
    assert ring_bandwidth(two, "tensor", tensor_ranks=8) == 450e9
    assert ring_bandwidth(two, "tensor", tensor_ranks=16) == 50e9


def test_the_curve_ends_where_the_batch_does(monkeypatch, capsys, tmp_path):
    config = load_config(CONFIGS / "gpt2_small_1k.yaml")
    ds_config = read_deepspeed_json(Path(config.run.deepspeed))
    with on_paper(config, ds_config) as paper:
        points = curve(paper, ds_config, Cluster(H100, 1, 8, 50e9), Assumptions())
    ends = {}
    for point in points:
        found = point.estimate
        assert found.micro_batch * found.accumulation * point.gpus == 1024
        ends[found.micro_batch] = max(ends.get(found.micro_batch, 0), point.gpus)
    assert ends == {16: 64, 8: 128, 4: 256, 2: 512, 1: 1024}
    say(monkeypatch, capsys, str(CONFIGS / "gpt2_small_1k.yaml"), "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_s_counts_are_those_of_the_nodes(monkeypatch, capsys, tmp_path):
    assert gpu_counts(Cluster(H100, 3, 8, 50e9), most=100) == [8, 16, 24, 32, 48, 64, 96]
    assert gpu_counts(Cluster(H100, 1, 1, 50e9), most=2) == [1, 2]
    assert gpu_counts(Cluster(H100, 1000, 8, 50e9), most=32) == [8, 16, 32, 8000]
    six = ("--gpus-per-node", "6", "--set", "model.tensor_parallel=3", "--json", "-")
    values = json.loads(say(monkeypatch, capsys, str(CONFIGS / "gpt2_small_1k.yaml"), *six))
    assert [point["gpus"] for point in values["curve"] if point["micro_batch"] == 16] == [6, 12, 24, 48, 96, 192]


def test_a_plot_that_fails_takes_nothing_with_it(monkeypatch, capsys, tmp_path):
    files = ("--plot", str(tmp_path / "plan.none"), "--json", str(tmp_path / "plan.json"))
    monkeypatch.setattr(sys, "argv", ["plan", str(CONFIGS / "quickstart.yaml"), "--gpus-per-node", "2", *files])
    with pytest.raises(SystemExit):
        command.main()
    said = capsys.readouterr()
    assert "Format 'none' is not supported" in said.err and "2 GPUs are valid" in said.out
    assert json.loads((tmp_path / "plan.json").read_text())["curve"]


def test_activations_are_those_of_a_real_pass():
    shape = ("num_layers=3", "hidden_size=64", "seq_length=96")
    config = load_config(CONFIGS / "quickstart.yaml", overrides=[f"model.{setting}" for setting in shape])
    ds_config = read_deepspeed_json(Path(config.run.deepspeed))
    with on_paper(config, ds_config) as paper:
        wanted = max(span.peak for span in paper.micro_batch(3).spans)
    with megatron_alone():
        model = build_model(config.model, vocab_size=256, dtype=torch.float32, device="cpu", seed=1)
        tokens = torch.zeros(3, 96, dtype=torch.int64)
        with Ledger([parameter.untyped_storage() for parameter in model.parameters()]) as ledger:
            masked_mean(model(tokens, tokens, None, labels=tokens), torch.ones(3, 96)).backward()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    # On a CPU attention makes its inputs contiguous, which keeps three tensors of a layer's 35 twice.
    assert wanted <= ledger.peak <= 1.1 * wanted + gradients
