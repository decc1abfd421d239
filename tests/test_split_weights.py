# SPDX-License-Identifier: Apache-2.0
"""Merit on weights that tensor-parallel ranks split, under real DeepSpeed and Megatron-core's groups on gloo ranks.

Given the same logical gradients, the weights and both moments, put together, equal the unsplit reference bit for bit.
The answer to LAMB's and Muon's faults under tensor parallelism, where a shard was taken for the whole weight.
"""

from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

from merit_ds import Merit, UnsupportedError
from merit_ds.reference import merit_step
from merit_ds.training.model import initialise_megatron
from merit_ds.training.parallel import MegatronGroups

STEPS = 3
SETTINGS = {"lr": 0.03, "weight_decay": 0.1}
NAMES = ("column", "row", "vocabulary", "gated", "fused", "norm", "bias", "whole", "unscaled")


@dataclass(frozen=True)
class Job:
    """A DeepSpeed configuration at a tensor-parallel size of the four ranks."""

    tensor: int
    zero: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Merit", "params": SETTINGS},
            "zero_optimization": self.zero,
            **self.extra,
        }


BF16 = {"bf16": {"enabled": True}}
JOBS = [
    Job(2, {"stage": 0}),
    Job(2, {"stage": 1}),
    Job(2, {"stage": 2}, BF16),
    Job(2, {"stage": 2, "round_robin_gradients": True}, BF16),
    Job(2, {"stage": 1}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    Job(2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    Job(4, {"stage": 1}),
]


def logical(name: str, seed: int) -> torch.Tensor:
    """A whole weight or gradient; every value fits bfloat16."""
    shapes = {"column": (16, 7), "row": (9, 8), "vocabulary": (32, 5), "gated": (24, 6), "fused": (16, 5), "norm": (7,)}
    shape = (shapes | {"bias": (16,), "whole": (5, 3), "unscaled": (8, 3)})[name]
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(map(ord, name))))
    return drawn.bfloat16().float()


def part(name: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A tensor-parallel rank's slice, as Megatron cuts it: of a gated weight's halves it takes a piece of each."""
    if name in ("norm", "whole"):
        return value
    if name == "gated":
        pieces = value.chunk(2 * size)
        return torch.cat((pieces[rank], pieces[size + rank]))
    return value.chunk(size, dim=int(name == "row"))[rank].contiguous()


def matrices(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """What MERIT sees of a whole weight; copies in the fused one's case."""
    if name != "fused":
        return [value]
    groups = value.view(-1, 4, value.shape[1])  # two rows of Q, one of K, one of V
    return [rows.reshape(-1, value.shape[1]) for rows in groups.split([2, 1, 1], dim=1)]


class Split(torch.nn.Module):
    """This rank's slices, with the attributes that Megatron's layers set."""

    def __init__(self, size: int) -> None:
        super().__init__()
        rank = parallel_state.get_tensor_model_parallel_rank()
        for name in NAMES:
            parameter = torch.nn.Parameter(part(name, logical(name, 0), rank, size).clone())
            parameter.tensor_model_parallel = name not in ("norm", "whole")
            parameter.partition_dim = int(name == "row") if parameter.tensor_model_parallel else -1
            parameter.partition_stride = 2 if name == "gated" else 1
            setattr(self, name, parameter)
        self.fused.matrix_view = ("qkv", 2, 1)
        self.unscaled.no_trust_ratio = True

    def forward(self) -> torch.Tensor:
        return sum((parameter.float() ** 2).sum() for parameter in self.parameters())


@dataclass(frozen=True)
class Run:
    """Elements of a parameter, from `first` on, that lie at `offset` in a tensor that Merit steps."""

    tensor: torch.Tensor
    offset: int
    name: str
    first: int
    numel: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor that lies as `tensor` does."""
        return values.view(-1)[self.offset : self.offset + self.numel]

    def wanted(self, value: torch.Tensor) -> torch.Tensor:
        """These elements of the parameter's own values."""
        return value.flatten()[self.first : self.first + self.numel]


def runs(model: Split, optimizer: torch.optim.Optimizer) -> list[Run]:
    """What this rank steps, by where the parameters lie in ZeRO's whole buffer; without ZeRO each parameter."""
    named = list(model.named_parameters())
    if not hasattr(named[0][1], "_dp_group"):
        return [Run(parameter, 0, name, 0, parameter.numel()) for name, parameter in named]
    (flat,) = optimizer.param_groups[0]["params"]
    begin = dist.get_rank(named[0][1]._dp_group) * flat.numel()
    found = []
    for name, parameter in named:
        low = max(parameter.storage_offset(), begin)
        high = min(parameter.storage_offset() + parameter.numel(), begin + flat.numel())
        if low < high:
            found.append(Run(flat, low - begin, name, low - parameter.storage_offset(), high - low))
    return found


def check_job(job: Job) -> int:
    """Train, with given gradients; after each step this rank's slices equal those of the unsplit replay."""
    initialise_megatron(seed=1, device=torch.device("cpu"), tensor_parallel=job.tensor)
    rank = parallel_state.get_tensor_model_parallel_rank()
    model = Split(job.tensor)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), mpu=MegatronGroups(), config=job.config()
    )
    optimizer = engine.basic_optimizer
    steps = iter(range(STEPS))
    mine = runs(model, optimizer)

    def give_gradients(*_: Any) -> None:
        step = next(steps)
        for run in mine:
            run.of(run.tensor.grad).copy_(run.wanted(part(run.name, logical(run.name, 100 + step), rank, job.tensor)))

    optimizer.register_step_pre_hook(give_gradients)
    expected = {name: logical(name, 0) for name in NAMES}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in expected.items()}
    for step in range(STEPS):
        engine.backward(engine())
        engine.step()
        for name in NAMES:
            replay(name, expected[name], *moments[name], step)
        for run in mine:
            state = optimizer.state[run.tensor]
            found = (run.tensor.detach(), state["exp_avg"], state["exp_avg_sq"])
            for ours, whole in zip(found, (expected[run.name], *moments[run.name]), strict=True):
                wanted = run.wanted(part(run.name, whole, rank, job.tensor))
                assert torch.equal(run.of(ours), wanted), f"{job}: {run.name}, step {step}"
    assert next(steps, None) is None, "Merit was not called"
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return rank


def replay(name: str, weight: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int) -> None:
    """One unsplit step, in place."""
    gradient = logical(name, 100 + step)
    decay = SETTINGS["weight_decay"] if weight.dim() > 1 else 0.0
    if name == "unscaled":
        m.mul_(0.9).add_(gradient * (1 - 0.9))
        v.mul_(0.95).add_(gradient * gradient * (1 - 0.95))
        update = m / (v.double().sqrt().float() + 1e-6) + weight * decay
        weight.sub_(update.clamp(-1, 1) * SETTINGS["lr"])
        return
    ids = matrices(name, torch.arange(weight.numel()).view(weight.shape))
    for index in ids:
        pieces = [value.flatten()[index] for value in (weight, gradient, m, v)]
        merit_step(*pieces, lr=SETTINGS["lr"], weight_decay=decay)
        for value, piece in zip((weight, m, v), (pieces[0], *pieces[2:]), strict=True):
            value.view(-1)[index] = piece


def undeclared_split_is_refused() -> str:
    """Slices without Megatron's attributes: every rank must refuse, or the shard would pass for the whole weight."""
    initialise_megatron(seed=1, device=torch.device("cpu"), tensor_parallel=2)
    weight = torch.nn.Parameter(
        part("column", logical("column", 0), parallel_state.get_tensor_model_parallel_rank(), 2)
    )
    weight.grad = torch.ones_like(weight)
    with pytest.raises(UnsupportedError) as refused:
        Merit([weight], lr=0.1).step()
    parallel_state.destroy_model_parallel()
    return str(refused.value)


def _all_jobs(rank: int) -> tuple[list[int], str]:
    return [check_job(job) for job in JOBS], undeclared_split_is_refused()


def test_split_equals_unsplit_on_four_ranks():
    for ranks, refusal in run_ranks(4, _all_jobs):
        assert len(ranks) == len(JOBS)
        assert "shape (8, 7) differs between tensor-parallel ranks and does not say how it is split" in refusal
