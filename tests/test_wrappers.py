# SPDX-License-Identifier: Apache-2.0
"""The refusals that need no particular JSON, and the way in for scripts that nobody may edit."""

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
from zero_cases import Case, Shapes

from merit_ds import Merit, UnsupportedError


def engine_of(case, groups=2):
    model = Shapes()
    return deepspeed.initialize(model=model, model_parameters=model.groups(groups), config=case.config(1))[0]


def message(action):
    with pytest.raises(UnsupportedError) as refused:
        action()
    return str(refused.value)


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


def _refusals(rank):
    return one_rank_refuses(), copies_are_refused()


def test_refusals_on_two_ranks():
    first, second = run_ranks(2, _refusals)
    assert "another rank" in first[0]
    assert "float32 weights are not the model's" in second[0] and "refresh_fp32_params" in second[0]
    assert "does not recognise the wrapper" in first[1]


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
