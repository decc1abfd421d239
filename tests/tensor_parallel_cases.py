# SPDX-License-Identifier: Apache-2.0
"""What test_tensor_parallel.py runs on several ranks: models, and the trainer itself, at several splits."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from megatron.core import parallel_state

from merit_ds.training import setup
from merit_ds.training.config import ModelConfig, load_config
from merit_ds.training.model import build_model, initialise_megatron
from merit_ds.training.plan import make_plan
from merit_ds.training.sample import sample_text
from merit_ds.training.tokenizer import build_tokenizer
from merit_ds.training.trainer import Trainer
from merit_ds.training.watch import Watch

CONTEXT = 16
LLAMA = {
    "norm": "rmsnorm",
    "qk_norm": True,
    "activation": "swiglu",
    "ffn_hidden_size": 24,
    "positions": "rotary",
    "tied_embeddings": False,
}


@dataclass(frozen=True)
class Split:
    """How a model, GPT-2 or a Llama with QK-Norm, is split over ranks."""

    tensor: int = 1
    sequence: bool = False
    recompute: bool = False
    llama: bool = False

    def whole(self) -> "Split":
        """The same model, not split."""
        return Split(llama=self.llama)

    def settings(self) -> dict[str, Any]:
        return (LLAMA if self.llama else {}) | {
            "tensor_parallel": self.tensor,
            "sequence_parallel": self.sequence,
            "activation_checkpointing": self.recompute,
        }


_GPT2_SPLITS = (Split(), Split(2), Split(2, sequence=True), Split(4), Split(4, sequence=True, recompute=True))
SPLITS = (*_GPT2_SPLITS, *(replace(split, llama=True) for split in _GPT2_SPLITS))


@dataclass(frozen=True)
class Run:
    """A run of the trainer; it may continue from another one's checkpoint of step 2."""

    name: str
    split: Split
    ds_config: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    continues: str | None = None

    def overrides(self, folder: Path) -> list[str]:
        values = {f"model.{key}": value for key, value in self.split.settings().items()} | {
            "data.prefix": str(folder / "data"),
            "run.deepspeed": str(folder / self.name / "deepspeed.json"),
            "run.train_tokens": self.steps * 8 * CONTEXT,
            "run.save": str(folder / self.name),
            "run.load": str(folder / self.name),
        }
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@contextmanager
def megatron(tensor_parallel: int) -> Iterator[None]:
    """Megatron-core's groups for a while; each rank's own random state must not reach the weights."""
    initialise_megatron(seed=dist.get_rank(), device=torch.device("cpu"), tensor_parallel=tensor_parallel)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def whole(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value of a parameter's shape, put together from the tensor-parallel ranks where they split it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value.clone()
    pieces = [torch.empty_like(value) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(pieces, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    # A gated MLP's first weight is two, one below the other, and each is split.
    runs = zip(*(piece.chunk(parameter.partition_stride, dim=parameter.partition_dim) for piece in pieces), strict=True)
    return torch.cat([part for run in runs for part in run], dim=parameter.partition_dim)


def draw_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and labels, each [2, CONTEXT]."""
    drawn = torch.randint(0, 256, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], torch.arange(CONTEXT).expand(2, -1), drawn[:, 1:]


def train_model(split: Split, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Initial weights, losses and gradients of two accumulated micro-batches, and sample text, all put together."""
    shape = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=CONTEXT, **split.settings())
    with megatron(split.tensor):
        model = build_model(shape, vocab_size=256, dtype=dtype, device="cpu", seed=1)
        weights = {name: whole(p, p.detach()) for name, p in model.named_parameters()}
        text = sample_text(
            model,
            build_tokenizer("byte"),
            prompt="odd",
            tokens=CONTEXT,
            seq_length=CONTEXT,
            device=torch.device("cpu"),
        )
        losses = []
        for seed in (1, 2):
            tokens, positions, labels = draw_batch(seed)
            per_token = model(tokens, positions, None, labels=labels)
            per_token.mean().backward()
            losses.append(per_token.detach())
        gradients = {name: whole(p, p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return {"weights": weights, "text": text, "losses": torch.stack(losses), "gradients": gradients}


def train_run(run: Run, folder: Path, *settings: str) -> dict[str, Any]:
    """The trainer from plan to last step; float32 weights before and after, put together."""
    plan = make_plan(load_config(folder / "recipe.yaml", overrides=[*run.overrides(folder), *settings]))
    try:
        setup.start_distributed(plan)
        data = setup.open_data(plan)
        engine = setup.wrap(plan, setup.build(plan, data))
        trainer = Trainer(engine, plan, data, Watch(plan))
        trainer.resume()
        before = float32_weights(engine.module)
        trainer.train()
        after = float32_weights(engine.module)
        engine.destroy()
    finally:
        parallel_state.destroy_model_parallel()
    return {"before": before, "after": after}


def float32_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """DeepSpeed's float32 weights, which a model in bfloat16 only has rounded; the model's where it shows none."""
    weights = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            master = None if p.dtype == torch.float32 else safe_get_full_fp32_param(p)
            weights[name] = whole(p, p.detach().float() if master is None else master)
    return weights


def copy_until(source: Path, target: Path, *, step: int) -> None:
    """Copy a run's folder as it would be, had the run been stopped at a checkpoint."""
    target.mkdir(exist_ok=True)
    shutil.copytree(source / f"global_step{step}", target / f"global_step{step}")
    shutil.copy(source / "metrics.jsonl", target)
    (target / "latest").write_text(f"global_step{step}")


def train_models() -> dict[Split, dict[str, Any]]:
    return {split: train_model(split) for split in SPLITS}


def train_runs(runs: list[Run], folder: Path) -> dict[str, dict[str, Any]]:
    """Every run, one after the other."""
    results = {}
    for run in runs:
        if run.continues is not None and dist.get_rank() == 0:
            copy_until(folder / run.continues, folder / run.name, step=2)
        dist.barrier()
        results[run.name] = train_run(run, folder)
    return results
