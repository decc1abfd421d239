# SPDX-License-Identifier: Apache-2.0
"""Holds a cell of the matrix: a real DeepSpeed engine trains, and Merit's steps in it are replayed unsharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from matrix import OVERFLOWS, STEPS, UNUSED, Cell, config, diverges, label, refusal, steps_taken, wrapper_name
from torch import Tensor
from zero_cases import SETTINGS, Recorder, Shapes, buffer_order, flat_partitions, gather, logical_matrices, offsets

from merit_ds import UnsupportedError
from merit_ds.reference import merit_step


def check_cells(rank: int, cells: list[Cell], options: dict[str, Any] | None = None) -> None:
    """Hold every cell to what the matrix says of it: exact, or refused. `options` are Merit's, beside its settings.

    DeepSpeed's CPU accelerator reports fp16 where the processor has instructions for it, and the engine refuses fp16
    elsewhere. torch computes it on every processor, so that check is lifted.
    """
    type(get_accelerator()).is_fp16_supported = lambda accelerator: True
    for cell in cells:
        try:
            expected = refusal(cell)
            if expected is None:
                check_exact(cell, options or {})
            else:
                kind = UnsupportedError if expected.by == "Merit" else Exception
                with pytest.raises(kind, match=expected.message), engine_of(cell, options or {}) as engine:
                    for step in range(STEPS):
                        train(engine, step)
        except BaseException as error:
            error.add_note(f"in the cell {label(cell)}")
            raise


def check_exact(cell: Cell, options: dict[str, Any]) -> None:
    """Train a few steps; after each, every rank's weights and moments are those of the unsharded replay, bit for bit.

    The replay starts from the averaged and clipped gradient that Merit was given: at 3 ranks the average of equal
    gradients is inexact, and the norm that clips them is summed in an order that depends on the partition. On a GPU the
    gradient itself depends on where ZeRO puts the weights, since cuBLAS chooses its kernel by their alignment. The
    replay runs on the CPU, wherever the engine does.
    """
    with engine_of(cell, options) as engine:
        assert type(engine.optimizer).__name__ == wrapper_name(cell)
        merit, given = engine.basic_optimizer, {}
        merit.register_step_pre_hook(lambda optimizer, *_: given.update(gradients(optimizer)))
        recorder = Recorder(merit)
        try:
            replays = [Replay(held, merit) for held in held_tensors(engine)]
            start = [replay.weights.clone() for replay in replays]
            for step in range(STEPS):
                train(engine, step)
                assert bool(given) == (step in steps_taken(cell)), f"DeepSpeed took step {step}, or left it out"
                for replay in replays:
                    replay.step(given.get(replay.held.tensor))
                    replay.compare(f"step {step}")
                given.clear()
        finally:
            recorder.close()
        check_calls(cell, recorder)
        for before, replay in zip(start, replays, strict=True):
            assert torch.equal(before, replay.weights) == (not steps_taken(cell)), "whether the weights moved"
            assert bool(replay.weights.isnan().any()) == diverges(cell)


@contextmanager
def engine_of(cell: Cell, options: dict[str, Any]) -> Iterator[Any]:
    """A DeepSpeed engine over the cell's model, gone afterwards."""
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed never resets it: it would hold for all later engines
    model = Kinds(cell)
    json = config(cell) | {"optimizer": {"type": "Merit", "params": SETTINGS | options}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.groups(cell["groups"]), config=json)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, step: int) -> None:
    """One step of the engine, of as many micro-steps as its JSON says."""
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(step, micro))
        engine.step()


def gradients(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """What a call of `step` is given."""
    tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
    return {tensor: tensor.grad.clone() for tensor in tensors if tensor.grad is not None}


def check_calls(cell: Cell, recorder: Recorder) -> None:
    """One MAX all-reduce for each call; DeepSpeedZeroOptimizer calls once for each group, the others for all."""
    wrapper, sharded = wrapper_name(cell), cell["wrapper"][0] > 0 and dist.get_world_size() > 1
    assert recorder.calls == len(steps_taken(cell)) * (cell["groups"] if wrapper == "DeepSpeedZeroOptimizer" else 1)
    assert recorder.collectives == (recorder.calls if sharded else 0)


class Kinds(Shapes):
    """`Shapes`, frozen and zero-size parameters included only where the cell says so, and the cell's other kinds.

    `tied` gives a weight a second name and use; `unused` leaves two parameters without a gradient in the step `UNUSED`;
    `overflow` makes the last rank's gradient infinite in the steps `OVERFLOWS`. The linear layer, which torch_autocast
    computes in 16 bits, is tall: short rows make its row ratios matter, and most rank counts cut it within a row.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        for kind in ("frozen", "empty"):
            if not cell[kind]:
                delattr(self, kind)
        if cell["tied"]:
            self.tied = self.matrix
        self.linear = torch.nn.Linear(7, 301, bias=False)
        torch.nn.init.normal_(self.linear.weight, std=0.1, generator=torch.Generator().manual_seed(6))

    def forward(self, step: int, micro: int) -> Tensor:
        """A loss in which every parameter has a gradient of its own on each rank and in each micro-step."""
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
        inputs = torch.randn(2, 7, generator=generator).to(self.linear.weight)  # its device and dtype
        loss = 2**-10 * self.linear(inputs).float().square().sum()  # small: GradScaler starts at 65536
        for name, parameter in self.named_parameters(recurse=False):
            target = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if not (self.cell["unused"] and step == UNUSED and name in ("wide", "vector")):
                loss = loss + (parameter.float() - target).square().sum()
        if self.cell["tied"]:
            loss = loss + self.tied.float().sin().sum()
        return loss * float("inf") if self.cell["overflow"] and step in OVERFLOWS and rank == last else loss

    def groups(self, count: int) -> list[dict[str, Any]]:
        """The third is a single element, so that all ranks but the first own none of it."""
        others = [parameter for parameter in self.parameters() if parameter is not self.single]
        if count == 1:
            return [{"params": [*others, self.single]}]
        groups = [{"params": others[:5]}, {"params": others[5:], "weight_decay": 0.2}]
        if count == 3:
            return [*groups, {"params": [self.single], "lr": 0.01}]
        groups[1]["params"].append(self.single)
        return groups


@dataclass(frozen=True)
class Held:
    """A tensor that Merit steps.

    Attributes:
        parts: the model's parameters that lie in it, and where each begins, by DeepSpeed's own account.
        sliced: whether it is this rank's slice of a flat buffer; `parts` then count in the buffer.
    """

    tensor: Tensor
    group: dict[str, Any]
    parts: list[tuple[Tensor, int]]
    sliced: bool

    def whole(self, local: Tensor) -> Tensor:
        """The flat values of all ranks, on the CPU: the slices end to end, or what all of them hold alike."""
        reachable = local.detach().view(-1).to(get_accelerator().current_device_name())  # NCCL reaches no other memory
        everyone = gather(reachable).cpu()
        if self.sliced:
            return everyone
        first, *others = everyone.split(local.numel())
        assert all(same(first, other) for other in others), "the ranks differ"
        return first


def held_tensors(engine: Any) -> list[Held]:
    """What the engine's wrapper hands to Merit."""
    wrapper, groups = engine.optimizer, engine.basic_optimizer.param_groups
    if engine.zero_optimization():
        flats = flat_partitions(wrapper)
        parts = [list(zip(buffer_order(wrapper)[i], offsets(wrapper, i), strict=True)) for i in range(len(flats))]
        return [Held(*each, sliced=True) for each in zip(flats, groups, parts, strict=True)]
    trained = [[tensor for tensor in group["params"] if tensor.requires_grad and tensor.numel()] for group in groups]
    models = getattr(wrapper, "fp16_groups", trained)
    return [
        Held(tensor, group, [(parameter, 0)], sliced=False)
        for group, tensors, model in zip(groups, trained, models, strict=True)
        for tensor, parameter in zip(tensors, model, strict=True)
    ]


class Replay:
    """The reference's weights and moments of one tensor that Merit steps, for all ranks together."""

    def __init__(self, held: Held, optimizer: torch.optim.Optimizer) -> None:
        self.held = held
        self.weights = held.whole(held.tensor).clone()
        self._optimizer = optimizer
        self._moments = {name: torch.zeros_like(self.weights) for name in ("exp_avg", "exp_avg_sq")}
        self._steps = 0
        self.compare("the start")

    def step(self, grad: Tensor | None) -> None:
        """One reference step for every weight in the tensor, given this rank's gradient; nothing for None."""
        if grad is None:
            return
        self._steps += 1
        settings = {name: self.held.group[name] for name in ("lr", "betas", "eps")}
        flats = (self.weights, self.held.whole(grad), *self._moments.values())
        for parameter, start in self.held.parts:
            decay = self.held.group["weight_decay"] if parameter.dim() > 1 else 0.0
            pieces = [logical_matrices(parameter, flat[start:]) for flat in flats]
            for weight, *others in zip(*pieces, strict=True):
                merit_step(weight, *others, **settings, weight_decay=decay)

    def compare(self, when: str) -> None:
        """The engine's master weights, moments, step counts and model, against the replay's."""
        held, state = self.held, self._optimizer.state.get(self.held.tensor) or {}
        assert same(held.whole(held.tensor), self.weights), f"master weights after {when}"
        for parameter, start in held.parts:
            wanted = self.weights[start : start + parameter.numel()].view(parameter.shape).to(parameter.dtype)
            assert same(parameter.detach().cpu(), wanted), f"the model's weights after {when}"
        assert state.get("step", 0) == self._steps, f"the step after {when}"
        assert not state or held.group["step"] == self._steps, f"the group's step after {when}"
        for name, wanted in self._moments.items():
            assert same(held.whole(state.get(name, torch.zeros_like(held.tensor))), wanted), f"{name} after {when}"


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; any NaN is like any other."""
    bits = [values.float().view(torch.int32).masked_fill(values.isnan(), -1) for values in (one, other)]
    return torch.equal(*bits)
