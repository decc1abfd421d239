# SPDX-License-Identifier: Apache-2.0
"""Writes a run's weights for transformers: a folder with config.json and model.safetensors.

    python -m merit_ds.training.export runs/gpt2 --output exported/gpt2
    AutoModelForCausalLM.from_pretrained("exported/gpt2")

GPT-2 becomes a GPT2LMHeadModel, a Llama-style model a LlamaForCausalLM, with QK-Norm a Qwen3ForCausalLM. Of the run it
takes the newest complete checkpoint, or --step. Weights are float32. A run in bfloat16 or float16 gives the rounded
weights that it computes with; to have its float32 master weights, and for a run with tensor parallelism, convert the
checkpoint by python -m merit_ds.training.universal first. The vocabulary keeps the rows by which it was
padded, so that logits and losses are those of the run. The tokenizer is not written: GPT-2's is
AutoTokenizer.from_pretrained("gpt2").
"""

import argparse
import json
from pathlib import Path

import torch

from merit_ds.errors import InputError
from merit_ds.training.alone import megatron_alone
from merit_ds.training.checkpoint_weights import load_model, open_run
from merit_ds.training.cli import report_errors
from merit_ds.training.manifest import write_text
from merit_ds.training.tokenizer import ByteTokenizer, Gpt2Tokenizer
from merit_ds.training.transformers_names import transformers_config, transformers_weights, zero_biases

WEIGHTS = "model.safetensors"


def export(folder: Path, *, output: Path, step: int | None = None) -> int:
    """Write `output`/config.json and model.safetensors.

    Args:
        folder: the run's (`run.save`).
        output: is made where missing; must not hold weights yet.
        step: of the checkpoint; None: the newest complete one.

    Returns:
        The step that was exported.

    Raises:
        InputError: there is no such checkpoint, it is damaged or split, transformers has no such model, safetensors is
            not installed, or `output` holds weights.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("the export needs safetensors: pip install safetensors") from None
    if (output / WEIGHTS).exists():
        raise InputError(f"{output / WEIGHTS} is there already: give another --output, or remove it")
    run = open_run(folder, step=step)
    shape = run.config.model
    end = {"gpt2": Gpt2Tokenizer.eod, "byte": ByteTokenizer.eod}[run.config.data.tokenizer]
    with megatron_alone():
        model = load_model(run, device=torch.device("cpu"))
        ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
        rows = ours["embedding.word_embeddings.weight"].shape[0]
        config = transformers_config(shape, rows=rows, end=end)
        weights = transformers_weights(shape, ours) | zero_biases(shape)
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f"{WEIGHTS}.unfinished"
    save_file({name: t.contiguous() for name, t in weights.items()}, unfinished, {"format": "pt"})
    write_text(output / "config.json", json.dumps(config, indent=2) + "\n")
    unfinished.rename(output / WEIGHTS)
    return run.checkpoint.manifest.step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the run's checkpoint folder (run.save)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to; made where missing")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest complete one)")
    arguments = parser.parse_args(argv)
    with report_errors():
        step = export(arguments.folder, output=arguments.output, step=arguments.step)
        print(f"{arguments.output}: the weights of step {step}, for AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    main()
