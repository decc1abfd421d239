# SPDX-License-Identifier: Apache-2.0
"""The trainer's runs continued on other ranks: fewer of them, more, and with layers that are no longer split."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import torch.distributed as dist
from alone import megatron_alone
from deepspeed.checkpoint import ds_to_universal, enable_universal_checkpoint
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
from engine_state import message
from ranks import run_ranks
from tensor_parallel_cases import CONTEXT, Run, Split, copy_until, train_run

from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model
from merit_ds.training.resharding import universal_info
from merit_ds.training.universal import make_universal

INFO = "universal_checkpoint_info"
REPLICATED = "tp_replicated_parameter_patterns"
ROW = "parameter_with_row_parallelism_patterns"
GATED = "parameter_with_2_sub_params_cat_dim_0"
STEPS, BATCH = 8, 12  # a batch that 1, 2, 3 and 4 ranks can share
RECIPE = f"""
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: {CONTEXT}}}
data: {{prefix: data, tokenizer: byte}}
run: {{deepspeed: none.json, train_tokens: {STEPS * BATCH * CONTEXT}, eval_interval: 100, eval_sequences: 6,
      save_interval: 2, keep_checkpoints: 9}}
"""
DEEPSPEED = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 2}},
}
ZERO1, ZERO2 = {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}}
BF16 = {"bf16": {"enabled": True}}
KINDS = {
    "data": (ZERO1, Split()),
    "tensor": (ZERO2 | BF16, Split(2, sequence=True)),
    "llama": (ZERO1 | BF16, Split(2, llama=True)),
}
HOPS = {
    "zero1": (ZERO1, [(4, Split()), (2, Split()), (1, Split()), (3, Split())]),
    "zero2": (ZERO2 | BF16, [(4, Split()), (2, Split()), (1, Split()), (3, Split())]),
    "split": (ZERO1 | BF16, [(4, Split(2, sequence=True)), (2, Split(2)), (1, Split()), (4, Split(4))]),
}


def test_the_patterns_fit_the_models_own_names():
    """What Megatron-core's layers say of themselves, for the parameters of all eleven layers, the tenth included."""
    shape = ModelConfig(num_layers=11, hidden_size=8, num_attention_heads=2, seq_length=4)
    with megatron_alone():
        model = build_model(shape, vocab_size=256, dtype=torch.float32, device="meta", seed=1)
    layers = [f"decoder.layers.{number}." for number in range(11)]
    norms = [f"{layer}{norm}.weight" for layer in layers for norm in ("input_layernorm", "pre_mlp_layernorm")]
    expected = {
        REPLICATED: {"embedding.position_embeddings.weight", "decoder.final_layernorm.weight", *norms},
        ROW: {f"{layer}{row}.weight" for layer in layers for row in ("self_attention.linear_proj", "mlp.linear_fc2")},
        GATED: set(),
    }
    info = universal_info(model)[INFO]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    matched = {kind: {name for name in trained for p in info[kind] if re.match(p, name)} for kind in expected}
    assert matched == expected
    assert sum(len(info[kind]) for kind in expected) == 6


def split_parameter(shape: tuple[int, ...], dim: int | None, stride: int = 1) -> torch.nn.Parameter:
    """A parameter as Megatron-core marks those that tensor-parallel ranks share out."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    if dim is not None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride
    return parameter


def test_the_converter_puts_each_kind_of_slice_together_and_takes_it_apart_again(tmp_path):
    """Columns, rows, the two halves of a gated MLP, a column-parallel bias, and what each rank has whole."""
    kinds = {
        "column": (split_parameter((6, 5), 0), lambda w: w.chunk(2)),
        "row": (split_parameter((6, 5), 1), lambda w: w.chunk(2, dim=1)),
        "gated": (
            split_parameter((6, 5), 0, stride=2),
            lambda w: (w[[0, 1, 2, 6, 7, 8]], w[[3, 4, 5, 9, 10, 11]]),
        ),
        "bias": (split_parameter((6,), 0), lambda w: w.chunk(2)),
        "norm": (split_parameter((6,), None), lambda w: (w, w)),
    }
    wholes = {"column": (12, 5), "row": (6, 10), "gated": (12, 5), "bias": (12,), "norm": (6,)}
    info = universal_info(torch.nn.ParameterDict({name: kind[0] for name, kind in kinds.items()}))[INFO]
    for name, (parameter, cut) in kinds.items():
        weight = torch.randn(wholes[name])
        slices = [part.contiguous() for part in cut(weight)]
        for tensor_rank, part in enumerate(slices):
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                place = (str(tmp_path / "slices"), tensor_rank, 0, state)
                ds_to_universal.dump_param_fragment(*place, part.flatten(), name, 0, part.numel())
        arguments = (str(tmp_path / "zero"), str(tmp_path / "slices"), 2, (name, [parameter.shape] * 2))
        ds_to_universal.merge_tp_slices(info, *arguments)
        assert torch.equal(torch.load(tmp_path / "zero" / name / "exp_avg.pt", weights_only=False)["param"], weight)
        enable_universal_checkpoint([parameter])
        for tensor_rank, part in enumerate(slices):
            address = fragment_address(numel=part.numel(), start=0)
            fragment = torch.empty(part.numel())
            parameter._hp_mapping = tensor_fragment(fragment, address, fragment, address, {}, {}, False, 0)
            parameter.load_hp_checkpoint_state(str(tmp_path / "zero" / name), tensor_rank, 2)
            assert torch.equal(fragment.view(part.shape), part)


@pytest.fixture
def folder(tmp_path):
    """A recipe with its data."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    launch.prepare_text(tmp_path)
    return tmp_path


def new_run(name: str, split: Split, ds_config: dict[str, Any]) -> Run:
    return Run(name, split, ds_config, steps=STEPS * BATCH // 8)  # `Run` counts in batches of 8


def place(folder: Path, run: Run, *, copy: tuple[str, int] | None = None) -> Run:
    """A folder for the run with its DeepSpeed JSON, and with another run's checkpoint of a step."""
    (folder / run.name).mkdir()
    (folder / run.name / "deepspeed.json").write_text(json.dumps(DEEPSPEED | run.ds_config))
    if copy is not None:
        copy_until(folder / copy[0], folder / run.name, step=copy[1])
    return run


def train(rank: int, runs: list[Run], folder: Path) -> dict[str, Any]:
    return {run.name: train_run(run, folder) for run in runs}


def elsewhere(folder: Path) -> str:
    """The setting of a run that saves to another folder than it continues from: nothing is converted in that."""
    return f"run.save={folder / 'elsewhere'}"


def train_in_pairs(rank: int, folder: Path) -> dict[str, Any]:
    """Each kind of run to its end, then again from step 4 on; the float32 weights at that step."""
    train(rank, [new_run(kind, split, zero) for kind, (zero, split) in KINDS.items()], folder)
    again = [new_run(f"{kind}_again", split, zero) for kind, (zero, split) in KINDS.items()]
    whole_layers = new_run("whole_layers", Split(), KINDS["tensor"][0])
    if rank == 0:
        for run, kind in (*zip(again, KINDS, strict=True), (whole_layers, "tensor")):
            place(folder, run, copy=(kind, 4))
    dist.barrier()
    refusal = message(lambda: train_run(whole_layers, folder, elsewhere(folder)))
    assert "saved with tensor_parallel 2, this run has 1; convert it by" in refusal
    return {kind: train(rank, [run], folder)[run.name]["before"] for kind, run in zip(KINDS, again, strict=True)}


def train_alone(rank: int, folder: Path) -> dict[str, Any]:
    """From step 4 on: in the same folder of itself; into another after the command that the refusal names."""
    before = {}
    for kind, (zero, split) in KINDS.items():
        run = place(folder, new_run(f"{kind}_alone", split.whole(), zero), copy=(kind, 4))
        if kind == "data":
            refusal = message(lambda run=run: train_run(run, folder, elsewhere(folder)))
            named = re.search(r"saved with ranks 2, this run has 1; convert it by (python -m .*), or start", refusal)
            subprocess.run([sys.executable, *shlex.split(named[1])[1:], "--workers", "2"], check=True)
        before[kind] = train(rank, [run], folder)[run.name]["before"]
    return before


def test_a_run_on_two_ranks_goes_on_alone(folder):
    """Data-parallel ranks 2 -> 1, and tensor-parallel ranks 2 -> 1: the same weights, schedule and sequences."""
    for kind, (zero, split) in KINDS.items():
        place(folder, new_run(kind, split, zero))
    paired = run_ranks(2, train_in_pairs, folder)[0]
    alone = run_ranks(1, train_alone, folder)[0]
    for kind in KINDS:
        assert paired[kind].keys() == alone[kind].keys()
        assert all(torch.equal(alone[kind][name], weight) for name, weight in paired[kind].items())
        check_continued(folder / f"{kind}_alone", folder / kind, step=4)


def check_continued(found: Path, expected: Path, *, step: int) -> None:
    """From `step` on the same sequences at the same rates; the losses differ by the order of sums alone."""
    rows = {row["iteration"]: row for row in launch.metrics(expected) if "loss" in row}
    continued = [row for row in launch.metrics(found) if "loss" in row and row["iteration"] > step]
    assert [row["iteration"] for row in continued] == list(range(step + 1, STEPS + 1))
    for row in continued:
        same = rows[row["iteration"]]
        assert (row["consumed_samples"], row["learning_rate"]) == (same["consumed_samples"], same["learning_rate"])
        assert row["loss"] == pytest.approx(same["loss"], rel=2e-3)


@pytest.mark.full
@pytest.mark.parametrize("kind", HOPS)
def test_a_run_goes_on_from_ranks_to_ranks(folder, kind):
    """4 -> 2 -> 1 -> 3 ranks under ZeRO-1 and 2; and tensor-parallel 2 -> 2 -> 1 -> 4, of 4, 2, 1 and 4 ranks."""
    zero, hops = HOPS[kind]
    for number, (ranks, split) in enumerate(hops):
        run = new_run(f"hop{number}", split, zero)
        if number == 0:
            run_ranks(ranks, train, [place(folder, run)], folder)
            continue
        place(folder, run, copy=(f"hop{number - 1}", 2 * number))
        universal = make_universal(folder / run.name)
        before = run_ranks(ranks, train, [run], folder)[0][run.name]["before"]
        saved = {
            name: torch.load(universal / "zero" / name / "fp32.pt", weights_only=False)["param"] for name in before
        }
        assert all(torch.equal(weight, saved[name]) for name, weight in before.items())
        check_continued(folder / run.name, folder / "hop0", step=2 * number)
