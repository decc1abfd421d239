# SPDX-License-Identifier: Apache-2.0
"""A real DeepSpeed engine over `zero_cases.Shapes`: its whole state to compare, and steps that are held exact."""

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from zero_cases import Case, Shapes, buffer_order, flat_partitions, gather, logical_matrices, offsets

from merit_ds.errors import InputError
from merit_ds.reference import merit_step

MOMENTS = ("exp_avg", "exp_avg_sq")


def build(case: Case, *, accumulation: int = 1) -> Any:
    """An engine with fresh weights, the same in every call."""
    model = Shapes()
    model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    config = case.config(accumulation)
    return deepspeed.initialize(model=model, model_parameters=model.groups(case.groups), config=config)[0]


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(engine(step, dist.get_rank()))
        engine.step()


def slices(engine: Any) -> dict[str, torch.Tensor]:
    """What the optimizer holds on this rank: tensors, their state, and the groups' step counts."""
    found = {}
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        found[f"{index} step"] = torch.tensor(group["step"])
        for number, tensor in enumerate(group["params"]):
            found[f"{index} {number}"] = tensor.detach().clone()
            state = engine.basic_optimizer.state.get(tensor, {})  # a frozen parameter has none
            found |= {f"{index} {number} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
    return found


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter's float32 weight and moments by name, gathered from ZeRO's slices, and all else that is kept.

    The positions come from the buffer that the model's parameters are views of, not from DeepSpeed's fragment map.
    """
    found = {}
    for group, flat in enumerate(flat_partitions(engine.optimizer)):
        state = engine.basic_optimizer.state.get(flat) or dict.fromkeys(MOMENTS, torch.zeros_like(flat)) | {"step": 0}
        buffers = {"fp32": flat.detach(), **{name: state[name] for name in MOMENTS}}
        for kind, buffer in ((kind, gather(buffer)) for kind, buffer in buffers.items()):
            for parameter, start in zip(
                buffer_order(engine.optimizer)[group], offsets(engine.optimizer, group), strict=True
            ):
                name = engine.param_names[parameter]
                found[f"{name} {kind}"] = buffer[start : start + parameter.numel()].view(parameter.shape).clone()
        settings = engine.basic_optimizer.param_groups[group]
        found[f"group {group}"] = torch.tensor([state["step"], settings["step"], settings["lr"]], dtype=torch.float64)
    # What the forward pass uses: trained, frozen and empty parameters, and buffers.
    found |= {f"{name} in use": value.detach().clone() for name, value in engine.module.state_dict().items()}
    position = -1 if engine.lr_scheduler is None else engine.lr_scheduler.last_batch_iteration
    found["positions"] = torch.tensor([engine.global_steps, engine.global_samples, position])
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and of the same dtype."""
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different
    assert all(found[name].dtype == value.dtype for name, value in expected.items())


def step_exactly(engine: Any, step: int) -> None:
    """One step, after which weights and moments equal the unsharded reference's, for the gradient given to Merit."""
    before, grads = whole(engine), []
    settings = [dict(group) for group in engine.basic_optimizer.param_groups]

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        grads.extend(tensor.grad.clone() for group in optimizer.param_groups for tensor in group["params"])

    hook = engine.basic_optimizer.register_step_pre_hook(note)
    train(engine, range(step, step + 1))
    hook.remove()
    after = whole(engine)
    for group, (given, grad) in enumerate(zip(settings, map(gather, grads), strict=True)):
        options = {key: given[key] for key in ("lr", "betas", "eps")}
        members = zip(buffer_order(engine.optimizer)[group], offsets(engine.optimizer, group), strict=True)
        for parameter, start in members:
            names = [f"{engine.param_names[parameter]} {kind}" for kind in ("fp32", *MOMENTS)]
            replayed = [before[name].clone() for name in names]
            views = [logical_matrices(parameter, part.flatten()) for part in replayed]
            decay = given["weight_decay"] if parameter.dim() > 1 else 0.0
            for w, m, v, g in zip(*views, logical_matrices(parameter, grad[start:]), strict=True):
                merit_step(w, g, m, v, **options, weight_decay=decay)
            different = [name for name, part in zip(names, replayed, strict=True) if not torch.equal(after[name], part)]
            assert not different


def message(action: Callable[[], Any]) -> str:
    """The one line with which `action` refuses."""
    with pytest.raises(InputError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def on_rank_zero(action: Callable[[], Any]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()
