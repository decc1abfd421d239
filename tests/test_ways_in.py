# SPDX-License-Identifier: Apache-2.0
"""Every way in, end to end, with real PyTorch, DeepSpeed and launcher: each must step Merit, and to the same bits.

Hugging Face's ways have a file of their own.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks
from torch.nn.parallel import DistributedDataParallel
from untouched_script import STEPS, Tiny, batch, train
from ways import SETTINGS, Witness, assert_equal, weights_of

from merit_ds import Merit
from merit_ds.reference import merit_step
from merit_ds.summary import adam_like

ZERO_2 = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
NAMED = ZERO_2 | {"optimizer": {"type": "Merit", "params": SETTINGS}}


def _through_deepspeed(config, make_optimizer):
    model = Tiny()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, optimizer=make_optimizer(model)
    )
    witness = Witness(engine.optimizer)
    train(engine)
    assert witness.moved() and witness.steps == STEPS
    return weights_of(model)


def _through_ddp(bucket_views):
    """Plain PyTorch; returns the weights, and the averaged gradients that Merit was given."""
    model = Tiny()
    start = weights_of(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    optimizer = Merit(model.parameters(), **SETTINGS)
    grads = []
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch(step, dist.get_rank())).backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
    return start, grads, weights_of(model)


def _without_hugging_face(rank):
    deepspeed_ways = [
        _through_deepspeed(NAMED, lambda model: None),
        _through_deepspeed(ZERO_2, lambda model: Merit(model.parameters(), **SETTINGS)),
        _through_deepspeed(ZERO_2, lambda model: partial(Merit, **SETTINGS)),
    ]
    return deepspeed_ways, [_through_ddp(bucket_views) for bucket_views in (False, True)]


@pytest.fixture(scope="module")
def by_hand():
    return run_ranks(2, _without_hugging_face)


def test_the_config_an_instance_and_a_callable_are_the_same(by_hand):
    """The callable that DeepSpeed wants is `functools.partial(Merit, lr=...)`: it needs no factory of ours."""
    for ways, _ in by_hand:
        for weights in ways:
            assert_equal(weights, by_hand[0][0][0])


def test_ddp_is_a_single_process_with_the_averaged_gradient(by_hand):
    for start, grads, weights in by_hand[0][1]:
        assert_equal(weights, by_hand[1][1][0][2])
        alone = {name: value.clone() for name, value in start.items()}
        for name, weight in alone.items():
            moments = torch.zeros_like(weight), torch.zeros_like(weight)
            settings = SETTINGS | ({} if weight.dim() > 1 else {"weight_decay": 0.0})
            for step in range(STEPS):
                merit_step(weight, grads[step][name], *moments, **settings)
            assert not torch.equal(weight, start[name]), name
        assert_equal(weights, alone)


def test_an_untouched_script_trains_with_merit(tmp_path, by_hand):
    """The launcher, the script's own argument parser and its JSON: the same bits as the config's way in."""
    script = Path(__file__).with_name("untouched_script.py")
    assert "merit_ds" not in script.read_text()
    (tmp_path / "ds.json").write_text(json.dumps(NAMED))
    port = free_port()
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    arguments = ["--deepspeed_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "weights.pt")]
    finished = subprocess.run(
        [*launcher, "--module", "merit_ds.run", str(script), *arguments],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink()  # 69 MB a rank, which DeepSpeed's communication op never removes
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("Merit: 3 matrices") == 1, finished.stdout
    assert_equal(torch.load(tmp_path / "weights.pt"), by_hand[0][0][0])


ADAM = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["lr 5e-05", "beta2 0.999", "eps 1e-8", "weight_decay 0"]),
        ({"lr": 9e-3}, ["beta2 0.999", "eps 1e-8", "weight_decay 0"]),
        ({"lr": 9e-3, "weight_decay": 0.1}, ["beta2 0.999", "eps 1e-8"]),
        ({"betas": (0.9, 0.95)}, ["lr 5e-05", "eps 1e-8", "weight_decay 0"]),
        ({"lr": 9e-3, "betas": (0.9, 0.95)}, []),
        ({"betas": (0.9, 0.95), "eps": 1e-6}, []),
        ({"lr": 9e-3, "eps": 1e-6, "weight_decay": 0.1}, []),
        ({"lr": 0.0, "eps": 1e-6, "betas": (0.9, 0.95)}, []),
    ],
)
def test_settings_that_look_like_adams_are_named(settings, named):
    line = adam_like([{**ADAM, **settings}]) or ""
    assert bool(line) == bool(named)
    for mark in ("lr 5e-05", "beta2 0.999", "eps 1e-8", "weight_decay 0"):
        assert (mark in line) == (mark in named), line


def test_a_group_without_decay_beside_one_with_it_is_not_suspicious():
    decayed = {**ADAM, "weight_decay": 0.1}
    assert "weight_decay 0" not in adam_like([decayed, ADAM])
