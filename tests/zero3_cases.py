# SPDX-License-Identifier: Apache-2.0
"""Runs a real ZeRO-3 engine with Merit, records what Merit was given, and replays it unsharded."""

import contextlib
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from zero_cases import STEPS, Case, Recorder, Shapes, gather, logical_matrices

from merit_ds.reference import merit_step


class Shapes3(Shapes):
    """With a weight that never gets a gradient, and the empty one where no forward pass fetches it.

    Under ZeRO-3, DeepSpeed's own gathering of a parameter without elements fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self.never_called = torch.nn.Module()
        self.never_called.idle = torch.nn.Parameter(torch.ones(5, 7))
        self.never_called.empty = self.empty
        del self.empty


def engine_of(case: Case, *, init: bool) -> Any:
    """An engine for the model, which is constructed within `deepspeed.zero.Init` or before it."""
    config = case.config(1)
    with deepspeed.zero.Init(config_dict_or_path=config) if init else contextlib.nullcontext():
        model = Shapes3()
    return deepspeed.initialize(model=model, model_parameters=model.groups(case.groups), config=config)[0]


def micro_steps(engine: Any, step: int) -> None:
    """The forward and backward passes of one step, and the step."""
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(10 * step + micro, dist.get_rank()))
        engine.step()


def whole(members: list[Any], flat: torch.Tensor) -> list[torch.Tensor]:
    """From all ranks' sub-groups, each parameter's flattened values."""
    parts = torch.split(flat.detach(), [parameter.ds_tensor.numel() for parameter in members])
    return [gather(part)[: parameter.ds_numel] for part, parameter in zip(parts, members, strict=True)]


class Replay:
    """A sub-group's weights and moments, unsharded, stepped by the reference."""

    def __init__(self, wrapper: Any, number: int) -> None:
        self.members = wrapper.fp16_groups[number]
        self.flat = wrapper.fp32_partitioned_groups_flat[number]
        self.weights = whole(self.members, self.flat)
        self.start = [weight.clone() for weight in self.weights]
        self._exp_avg = [torch.zeros_like(weight) for weight in self.weights]
        self._exp_avg_sq = [torch.zeros_like(weight) for weight in self.weights]
        self._settings = wrapper.optimizer.param_groups[wrapper.sub_group_to_group_id[number]]
        self._state = wrapper.optimizer.state

    def step(self, grad: torch.Tensor) -> None:
        """Step, given this rank's gradient."""
        lr, betas, eps, decay = (self._settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
        states = zip(self.weights, whole(self.members, grad), self._exp_avg, self._exp_avg_sq, strict=True)
        for parameter, state in zip(self.members, states, strict=True):
            own_decay = decay if len(parameter.ds_shape) > 1 else 0.0
            for w, g, m, v in zip(*(logical_matrices(parameter, values) for values in state), strict=True):
                merit_step(w, g, m, v, lr=lr, betas=betas, eps=eps, weight_decay=own_decay)

    def compare(self, *, steps: int) -> None:
        """Assert that Merit made the same of the sub-group, bit for bit."""
        state = self._state[self.flat]
        found = (self.flat, state["exp_avg"], state["exp_avg_sq"])
        for sharded, expected in zip(found, (self.weights, self._exp_avg, self._exp_avg_sq), strict=True):
            for ours, wanted in zip(whole(self.members, sharded), expected, strict=True):
                assert torch.equal(ours, wanted), f"step {steps}"
        assert state["step"] == self._settings["step"] == steps


def check_case(case: Case, *, init: bool) -> dict[str, Any]:
    """Train a few steps; after each, the gathered weights and moments equal the unsharded replay's, bit for bit."""
    engine = engine_of(case, init=init)
    wrapper = engine.optimizer
    replays = [Replay(wrapper, number) for number in range(len(wrapper.fp16_groups))]
    recorder = Recorder(wrapper.optimizer)
    try:
        for step in range(STEPS):
            micro_steps(engine, step)
            grads, recorder.grads = recorder.grads, []
            for replay, grad in zip(replays, grads, strict=True):
                replay.step(grad)
                replay.compare(steps=step + 1)
    finally:
        recorder.close()
    values = model_values(engine)
    for replay in replays:
        for parameter, before, after in zip(replay.members, replay.start, replay.weights, strict=True):
            assert not torch.equal(before, after), "a weight did not move"
            name = wrapper.param_names[parameter]
            assert torch.equal(values[name].view(-1), after.to(values[name].dtype)), name
    outcome = {"sub_groups": len(replays), "calls": recorder.calls, "collectives": recorder.collectives}
    engine.destroy()
    return outcome | {"weights": values}


def model_values(engine: Any) -> dict[str, torch.Tensor]:
    """The model's weights as its forward pass sees them."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.ds_numel}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}
