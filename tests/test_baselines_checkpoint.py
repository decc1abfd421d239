# SPDX-License-Identifier: Apache-2.0
"""What a baseline's step depends on beside its moments, LAMB's step count, is there on another number of ranks."""

import pytest
import torch
from engine_state import build, train
from ranks import run_ranks
from zero_cases import Case

from merit_ds.training.checkpoint import load_checkpoint, save_checkpoint
from merit_ds.training.universal import make_universal

STEPS = 3
LAMB = {"optimizer": {"type": "MeritLAMB", "params": {"lr": 0.02}}}
CASES = [Case("fp32", zero={"stage": 2}, extra=LAMB), Case("bf16_groups", "bf16", 3, {"stage": 1}, LAMB)]


def _save(rank, folder):
    for case in CASES:
        engine = build(case)
        train(engine, range(STEPS))
        save_checkpoint(engine, folder / case.name, step=STEPS, model={}, client_state={"step": STEPS}, keep=1)
        engine.destroy()


def _corrections(rank, folder):
    """The bias corrections of the next step, for every tensor that this rank steps."""
    found = []
    for case in CASES:
        engine = build(case)
        load_checkpoint(engine, folder / case.name, model={})
        optimizer = engine.basic_optimizer
        for group in optimizer.param_groups:
            step = optimizer.state[group["params"][0]]["step"]
            row = optimizer.rule.scalars({**group, "step": step})[0]
            found.append((float(row.correction1), float(row.root_correction2)))
        engine.destroy()
    return found


@pytest.mark.parametrize("universal", [False, True])
def test_the_bias_correction_goes_on(tmp_path, universal):
    run_ranks(2, _save, tmp_path)
    if universal:
        for case in CASES:
            make_universal(tmp_path / case.name)
    wanted = 1 / (1 - 0.9 ** (STEPS + 1)), 1 / (1 - 0.95 ** (STEPS + 1)) ** 0.5
    for found in run_ranks(3 if universal else 2, _corrections, tmp_path):
        assert len(found) == sum(case.groups for case in CASES)
        for pair in found:
            torch.testing.assert_close(torch.tensor(pair), torch.tensor(wanted))
