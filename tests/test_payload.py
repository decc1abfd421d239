# SPDX-License-Identifier: Apache-2.0
"""The bytes that Merit sends: computed from shapes, counted in a real run, and small beside the gradients."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import merit_ds  # noqa: F401  (registers the optimizer)
from merit_ds.payload import payload
from merit_ds.training.config import load_config
from merit_ds.training.model import build_model, initialise_megatron

RECIPES = ["gpt2_small_1k", "gpt2_medium_4k", "gpt2_large_8k"]


def model():
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(19, 7), torch.nn.Linear(7, 33, bias=False), torch.nn.Linear(33, 3))


def _counted(rank, stage):
    """Elements and element size of every int32 all-reduce within Merit's step."""
    sent = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        if tensor.dtype == torch.int32:
            sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    network = model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Merit", "params": {"lr": 0.01}},
    }
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    dist.all_reduce = counting
    try:
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 19, dtype=torch.bfloat16)).sum())
            engine.step()
    finally:
        dist.all_reduce = all_reduce
    return sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_computed_bytes_are_those_of_a_real_run(ranks):
    wanted = payload(list(model().parameters()), ranks=ranks).maxima_bytes
    assert run_ranks(ranks, _counted, ranks - 1) == [[wanted, wanted]] * ranks


def _shares(rank, recipes):
    initialise_megatron(seed=1, device=torch.device("meta"))
    shares = {}
    for recipe in RECIPES:
        settings = load_config(recipes / f"{recipe}.yaml").model
        meta = build_model(settings, vocab_size=50257, dtype=torch.bfloat16, device="meta", seed=1)
        for ranks in (8, 64, 512):
            shares[recipe, ranks] = payload(list(meta.parameters()), ranks=ranks).share
    return shares


def test_maxima_are_small_beside_the_gradients(pytestconfig):
    (shares,) = run_ranks(1, _shares, pytestconfig.rootpath / "configs")
    assert len(shares) == 9 and all(0 < share < 0.003 for share in shares.values()), shares


def test_one_rank_sends_nothing():
    assert payload(list(model().parameters()), ranks=1).maxima_bytes == 0
