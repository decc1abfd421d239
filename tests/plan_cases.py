# SPDX-License-Identifier: Apache-2.0
"""What test_plan_run.py runs on several ranks: real training steps, in which every tensor and collective is counted."""

import gc
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state

from merit_ds.plan.ledger import Ledger
from merit_ds.training import setup
from merit_ds.training.config import Config, load_config
from merit_ds.training.interrupt import Interrupt
from merit_ds.training.plan import make_plan
from merit_ds.training.trainer import Trainer
from merit_ds.training.watch import Watch

BATCH = 24
BUCKET = 20_000
"""Elements: a third of the model's, so that there are several, and a weight that is larger."""
# Two tokens: next to the weights the activations are nearly nothing.
RECIPE = """
model: {num_layers: 3, hidden_size: 36, num_attention_heads: 2, seq_length: 2}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: ds.json, train_tokens: 336, eval_sequences: 1}
telemetry: {interval: 0}
"""
JSON = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
}


@dataclass(frozen=True)
class Case:
    """A run: what differs from `RECIPE` and `JSON`, and from `BUCKET`-sized buckets."""

    name: str
    json: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Three that share the batch, or two pairs that share layers."""
        return 4 if "tensor_parallel" in self.model else 3

    def config(self, folder: Path) -> Config:
        settings = {f"model.{key}": value for key, value in self.model.items()}
        settings |= {"run.deepspeed": str(folder / f"{self.name}.json"), "data.prefix": str(folder / "data")}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return load_config(folder / "recipe.yaml", overrides=overrides)

    def ds_config(self) -> dict[str, Any]:
        zero = {"reduce_bucket_size": BUCKET} if self.zero.get("stage") else {}
        return JSON | self.json | {"zero_optimization": zero | self.zero}


@dataclass(frozen=True)
class Measured:
    """One rank's steps.

    Attributes:
        sent: bytes and calls by collective and ranks.
        parameters, optimizer: bytes of the model's parameters; of what is stepped, if it is not these, and its state.
        peak: most bytes alive in a step, these included.
        wrapper: the class around the optimizer.
    """

    sent: dict[tuple[str, tuple[int, ...]], tuple[int, int]]
    parameters: int
    optimizer: int
    peak: int
    wrapper: str


def measure_all(rank: int, cases: list[Case], folder: Path) -> dict[str, Measured]:
    # DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes it anywhere.
    type(get_accelerator()).is_fp16_supported = lambda accelerator: True
    torch._dynamo.config.disable = True  # Muon's update as it is written: to compile it takes a minute
    results = {}
    for case in cases:
        try:
            results[case.name] = measure(case.config(folder))
        except BaseException as error:
            error.add_note(f"in the case {case.name}")
            raise
    return results


def measure(config: Config) -> Measured:
    """The trainer from plan through a few steps; from the second on the optimizer has all its state."""
    before = {id(storage): storage for storage in alive()}  # held, so that no other gets its id
    plan = make_plan(config)
    try:
        setup.start_distributed(plan)
        data = setup.open_data(plan)
        engine = setup.wrap(plan, setup.build(plan, data))
        trainer = Trainer(engine, plan, data, Watch(plan))
        with Interrupt() as interrupt:
            trainer.train_step(interrupt)
            ledger = Ledger([storage for storage in alive() if id(storage) not in before], counted=True)
            # gloo's threads may hold a tensor for a moment longer: the least of six, two were both too high once.
            peak = min(count_step(trainer, interrupt, ledger) for _ in range(6))
        model = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.module.parameters()}
        stepped = stepped_storages(engine.basic_optimizer)
        totals: Counter[tuple[str, tuple[int, ...]]] = Counter()
        calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for sent in ledger.sent:
            if len(sent.ranks) > 1:
                totals[sent.collective, sent.ranks] += sent.size
                calls[sent.collective, sent.ranks] += 1
        return Measured(
            sent={key: (totals[key], calls[key]) for key in totals},
            parameters=sum(model.values()),
            optimizer=sum(size for place, size in stepped.items() if place not in model),
            peak=peak,
            wrapper=type(engine.optimizer).__name__,
        )
    finally:
        engine.destroy()
        parallel_state.destroy_model_parallel()


def count_step(trainer: Trainer, interrupt: Interrupt, ledger: Ledger) -> int:
    """Most bytes alive in one step; the ledger then holds what it sent."""
    ledger.reset_peak()
    ledger.sent.clear()
    with ledger:
        trainer.train_step(interrupt)
    return ledger.peak


def alive() -> list[torch.UntypedStorage]:
    """The storages of all tensors that Python knows of, and of gradients; each once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return list({tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values())


def stepped_storages(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Bytes by address of the tensors that the optimizer steps, and of their state."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    moments = [value for value in states if isinstance(value, torch.Tensor) and value.dim()]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in [*tensors, *moments]}
