# SPDX-License-Identifier: Apache-2.0
"""The export of a run's weights: loaded by transformers, they give the run's logits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import launch
import pytest
import torch
from alone import megatron_alone
from planted import change
from transformers import AutoModelForCausalLM

from merit_ds.errors import InputError
from merit_ds.training.checkpoint_weights import load_model, open_run
from merit_ds.training.config import ModelConfig
from merit_ds.training.export import export, main
from merit_ds.training.manifest import read_manifest, write_manifest
from merit_ds.training.transformers_names import transformers_config
from merit_ds.training.universal import make_universal

RECIPE = """
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, seq_length: 16, ffn_hidden_size: 40}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: merit.json, train_tokens: 512, eval_interval: 100, eval_sequences: 2, save_interval: 2}
"""
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Merit", "params": {"lr": 0.02}},
}
LLAMA = ("model.norm=rmsnorm", "model.activation=swiglu", "model.positions=rotary")
RUNS = {
    "gpt2": ("GPT2LMHeadModel", 0, ()),
    "llama": ("LlamaForCausalLM", 0, (*LLAMA, "model.tied_embeddings=false")),
    "split": ("Qwen3ForCausalLM", 2, (*LLAMA, "model.qk_norm=true", "model.tensor_parallel=2")),
}
"""By name: the class in transformers, ranks (0: plain python), changes to the recipe. Four steps each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    (path / "recipe.yaml").write_text(RECIPE)
    (path / "merit.json").write_text(json.dumps(DEEPSPEED))
    launch.prepare_text(path)
    for name, (_, ranks, changes) in RUNS.items():
        settings = [text for change in changes for text in ("--set", change)]
        finished = launch.run(path, "--save", name, *settings, ranks=ranks)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    make_universal(path / "split")
    return path


@pytest.mark.parametrize("name", RUNS)
def test_transformers_gets_the_runs_logits(folder: Path, name: str) -> None:
    run = folder / name
    assert export(run, output=folder / f"{name}-exported") == 4
    theirs, report = AutoModelForCausalLM.from_pretrained(folder / f"{name}-exported", output_loading_info=True)
    assert type(theirs).__name__ == RUNS[name][0]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(1))
    with megatron_alone(), torch.no_grad():
        ours = load_model(open_run(run), device=torch.device("cpu")).eval()
        expected = ours(tokens, torch.arange(16).expand(3, -1), None)
        found = theirs.eval()(tokens).logits
    assert found.shape == expected.shape  # with the rows by which the vocabulary was padded
    assert (found - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "split"])
def test_a_run_of_transformer_engine_s_layers_is_read_as_well(folder: Path, tmp_path: Path, name: str) -> None:
    """These hold a norm in the linear layer behind it; renamed, as there is no Transformer Engine on a CPU."""
    run, renamed = folder / name, tmp_path / name
    shutil.copytree(run, renamed)
    with megatron_alone():
        expected = load_model(open_run(run), device=torch.device("cpu")).state_dict()
        checkpoint = open_run(renamed).checkpoint.path
        if name == "split":
            for path in sorted((checkpoint / "zero").glob("*layernorm*")):
                path.rename(path.with_name(fused(path.name)))
        else:
            file = "mp_rank_00_model_states.pt"
            change(
                checkpoint, file, lambda state: state.update(module={fused(k): v for k, v in state["module"].items()})
            )
        manifest = read_manifest(checkpoint)
        files = {fused(file): entry for file, entry in manifest.files.items()}
        write_manifest(checkpoint, replace(manifest, files=files))
        found = load_model(open_run(renamed), device=torch.device("cpu")).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items() if isinstance(value, torch.Tensor))


def fused(name: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def test_a_step_can_be_chosen_and_nothing_is_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder / "gpt2"), "--output", str(folder / "early"), "--step", "2"])
    assert "the weights of step 2" in capsys.readouterr().out
    before = (folder / "early/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="1"):
        main([str(folder / "gpt2"), "--output", str(folder / "early")])
    assert "is there already" in capsys.readouterr().err
    assert (folder / "early/model.safetensors").read_bytes() == before


def test_what_transformers_does_not_have_is_refused() -> None:
    shape = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, qk_norm=True)
    with pytest.raises(InputError, match=r"transformers has no model with norm layernorm.*qk_norm True"):
        transformers_config(shape, rows=256, end=0)
