# SPDX-License-Identifier: Apache-2.0
"""Stage 0, the refusals, and the way in for scripts that nobody may edit."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from zero_cases import STEPS, Case, Shapes, logical_matrices

from merit_ds import Merit, UnsupportedError
from merit_ds.reference import merit_step

STAGE_0 = [Case("stage 0, fp32", zero={"stage": 0}), Case("stage 0, bf16", "bf16", zero={"stage": 0})]


def engine_of(case, groups=2):
    model = Shapes()
    return deepspeed.initialize(model=model, model_parameters=model.groups(groups), config=case.config(1))[0]


def stepped(group):
    return [p for p in group["params"] if p.requires_grad and p.numel()]


def check_stage_0(case):
    """Each fp32 weight follows the reference, given the gradient that Merit got."""
    engine = engine_of(case)
    optimizer = engine.basic_optimizer
    grads = []
    optimizer.register_step_pre_hook(lambda *_: grads.append([[p.grad.clone() for p in g["params"]] for g in groups()]))

    def groups():
        return [g | {"params": stepped(g)} for g in optimizer.param_groups]

    model_groups = [stepped(g) for g in engine.module.groups(2)]
    weights = [[p.detach().float().clone() for p in group] for group in model_groups]
    start = [[weight.clone() for weight in group] for group in weights]
    for ours, wanted in zip(groups(), weights, strict=True):
        assert all(torch.equal(p, w) for p, w in zip(ours["params"], wanted, strict=True)), "moved before any step"
    moments = [[(torch.zeros_like(w), torch.zeros_like(w)) for w in group] for group in weights]
    for step in range(STEPS):
        engine.backward(engine(step, dist.get_rank()))
        engine.step()
        for index, group in enumerate(groups()):
            for each, parameter in enumerate(model_groups[index]):
                state = (weights[index][each], grads[-1][index][each], *moments[index][each])
                decay = group["weight_decay"] if parameter.dim() > 1 else 0.0
                settings = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"], "weight_decay": decay}
                for w, g, m, v in zip(*(logical_matrices(parameter, t.view(-1)) for t in state), strict=True):
                    merit_step(w, g, m, v, **settings)
                assert torch.equal(group["params"][each], weights[index][each]), f"{case.name}: step {step}"
                assert torch.equal(parameter, weights[index][each].to(parameter.dtype))
                assert optimizer.state[group["params"][each]]["step"] == step + 1
    assert not any(
        torch.equal(a, b) for old, new in zip(start, weights, strict=True) for a, b in zip(old, new, strict=True)
    )
    return type(engine.optimizer).__name__


def message(action):
    with pytest.raises(UnsupportedError) as refused:
        action()
    return str(refused.value)


def stage_3_message():
    def train():
        model, config = torch.nn.Linear(8, 8), Case("stage 3", "bf16", zero={"stage": 3}).config(1)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
        engine.step()

    return message(train)


def one_rank_refuses():
    """Only rank 1's master weights are not the model's: both ranks must refuse, neither may wait for ever."""
    engine = engine_of(Case("stage 2", "bf16", zero={"stage": 2}), groups=1)
    if dist.get_rank() == 1:
        engine.optimizer.single_partition_of_fp32_groups[0].data += 1
    before = engine.optimizer.single_partition_of_fp32_groups[0].clone()
    engine.backward(engine(0, dist.get_rank()))
    line = message(engine.step)
    assert torch.equal(engine.optimizer.single_partition_of_fp32_groups[0], before)
    engine.optimizer.refresh_fp32_params()
    engine.backward(engine(1, dist.get_rank()))
    assert message(engine.step) == line, "the moments were touched: going on would not be exact"
    return line


def copies_are_refused():
    """A copy of the optimizer inside ZeRO has flat partitions, and no way to know what lies in them."""
    engine = engine_of(Case("stage 2", zero={"stage": 2}))
    copied = copy.deepcopy(engine.basic_optimizer)
    for group in copied.param_groups:
        for flat in group["params"]:
            flat.grad = torch.ones_like(flat)
    return message(copied.step)


def fsdp_message():
    model = fully_shard(torch.nn.Linear(8, 8, bias=False), mesh=init_device_mesh("cpu", (2,)))
    optimizer = Merit(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    return message(optimizer.step)


def _all_wrappers(rank):
    outcomes = [check_stage_0(case) for case in STAGE_0], stage_3_message(), one_rank_refuses(), copies_are_refused()
    return *outcomes, fsdp_message()


def test_stage_0_and_refusals_on_two_ranks():
    first, second = run_ranks(2, _all_wrappers)
    assert first[0] == second[0] == ["Merit", "FP16_UnfusedOptimizer"]
    assert first[1] == second[1] and "zero_optimization.stage" in first[1]
    assert "another rank" in first[2]
    assert "does not recognise the wrapper" in first[3]
    assert "FSDP" in first[4]
    assert "float32 weights are not the model's" in second[2] and "refresh_fp32_params" in second[2]


def test_an_unknown_wrapper_is_refused():
    optimizer = Merit([torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))], lr=0.1)
    flat = torch.nn.Parameter(torch.ones(7))
    flat.grad = torch.ones(7)
    optimizer.param_groups[0]["params"] = [flat]
    assert "does not recognise the wrapper" in message(optimizer.step)
    optimizer.param_groups = [dict(optimizer.param_groups[0])]
    assert "param_groups were replaced" in message(optimizer.step)


SCRIPT = """
import sys, torch
import beside
print("argv", sys.argv[1:], __name__, torch.optim.Merit.__module__)
"""


def test_a_script_that_nobody_may_edit_runs_with_merit_registered(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--master_port", str(free_port())]

    def launch(*arguments):
        command = [*launcher, "--module", "merit_ds.run", *arguments]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    finished = launch(str(tmp_path / "train.py"), "--lr", "0.1", "data.txt")
    line = f"argv ['--local_rank=0', '--lr', '0.1', 'data.txt'] __main__ {Merit.__module__}"
    assert finished.returncode == 0 and line in finished.stdout, finished.stdout + finished.stderr
    missing = launch(str(tmp_path / "absent.py"))
    assert missing.returncode == 1 and "error: " in missing.stderr and "absent.py: no such script" in missing.stderr
