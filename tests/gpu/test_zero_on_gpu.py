# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed engines on all GPUs of a machine, over NCCL, against plain PyTorch on one."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

SETTINGS = {"lr": 0.03, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
STEPS = 3


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(301, 97), torch.nn.GELU(), torch.nn.Linear(97, 64), torch.nn.LayerNorm(64)
    )


def _train(model, batch, backward, step):
    for _ in range(STEPS):
        backward(model(batch).float().square().mean())
        step()
    return [weight.detach().float().cpu() for weight in model.parameters()]


def _rank(rank, world, port, stage, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    import merit_ds  # noqa: F401  (registers the optimizer)

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Merit", "params": {**SETTINGS, "fused": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0,
    }
    torch.cuda.set_device(rank)
    model = _model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batch = torch.randn(8, 301, generator=torch.Generator().manual_seed(1)).to(engine.device)
    results[rank] = _train(engine, batch, engine.backward, engine.step)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_gpus_give_what_one_gives(stage):
    """Every rank has the same batch, and their number is a power of two: the averaged gradient is each rank's."""
    from merit_ds import Merit

    world = 1 << (torch.cuda.device_count().bit_length() - 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = mp.Manager().dict()
    mp.spawn(_rank, args=(world, port, stage, results), nprocs=world)
    model = _model().cuda()
    optimizer = Merit(model.parameters(), **SETTINGS, fused=True)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    batch = torch.randn(8, 301, generator=torch.Generator().manual_seed(1)).cuda()
    alone = _train(model, batch, torch.Tensor.backward, step)
    for rank in range(world):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[rank], alone, strict=True))
