# SPDX-License-Identifier: Apache-2.0
"""The baselines in real DeepSpeed engines on gloo ranks, against the same optimizers over whole parameters."""

import deepspeed
import pytest
import torch
from baseline_cases import EXACT, ROUNDED, NonEmptyShapes, kind_of, options
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from ranks import run_ranks

from merit_ds.errors import UnsupportedError
from merit_ds.shard import full_shape

STEPS = 3
CASES = [
    (name, stage, "fp32") for name in EXACT | ROUNDED for stage in (1, 2, 3) if (name, stage) != ("MeritSophiaG", 3)
]
CASES += [(name, 2, "bf16") for name in ("MeritMaxLAMB", "MeritLAMB", "MeritScion")]


def engine_of(name, stage, dtype):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind_of(name).__name__, "params": options(name)},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    model = NonEmptyShapes()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # ZeRO steps the groups one by one; in the second, most ranks hold nothing.
    groups = [{"params": parameters[:-1]}, {"params": parameters[-1:]}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine, parameters


def whole_copies(parameters):
    """Float32 parameters of their own, with the attributes by which the optimizers tell what they are."""
    copies = []
    for parameter in parameters:
        copy = torch.nn.Parameter(safe_get_full_fp32_param(parameter).clone().view(full_shape(parameter)))
        for mark in ("matrix_view", "sign_update"):
            if hasattr(parameter, mark):
                setattr(copy, mark, getattr(parameter, mark))
        copies.append(copy)
    return copies


def check_case(rank, name, stage, dtype):
    engine, parameters = engine_of(name, stage, dtype)
    copies = whole_copies(parameters)
    alone = kind_of(name)(copies, **options(name))
    for step in range(STEPS):
        if name == "MeritSophiaG" and step % 2 == 0:
            draw = torch.Generator().manual_seed(step)
            estimate = [torch.randn(parameter.shape, generator=draw) for parameter in parameters]
            engine.basic_optimizer.update_hessian(estimate, examples=10)
            alone.update_hessian(estimate, examples=10)
        engine.backward(engine(step, rank))
        for parameter, copy in zip(parameters, copies, strict=True):
            copy.grad = safe_get_full_grad(parameter).float().clone().view(copy.shape)
        engine.step()
        alone.step()
        for parameter, copy in zip(parameters, copies, strict=True):
            ours, theirs = safe_get_full_fp32_param(parameter).view(copy.shape), copy.detach()
            if name in EXACT:
                assert torch.equal(ours, theirs), f"step {step}, {tuple(copy.shape)}"
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    engine.destroy()


def _check_all(rank):
    for case in CASES:
        try:
            check_case(rank, *case)
        except BaseException as error:
            error.add_note(f"in the case {case}")
            raise


@pytest.mark.parametrize("world", [2, 3])
def test_every_baseline_is_right_under_zero(world):
    run_ranks(world, _check_all)


def _refusals(rank):
    engine, parameters = engine_of("MeritSophiaG", 3, "fp32")
    with pytest.raises(UnsupportedError, match=r"zero_optimization\.stage 3"):
        engine.basic_optimizer.update_hessian([torch.ones(full_shape(p)) for p in parameters], examples=1)
    engine.destroy()
    engine, _ = engine_of("MeritSophiaG", 2, "fp32")
    engine.backward(engine(0, rank))
    with pytest.raises(UnsupportedError, match="update_hessian"):
        engine.step()
    engine.destroy()


def test_sophia_refuses_what_would_not_be_right():
    run_ranks(2, _refusals)
