# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU against the plain formula on the CPU, bit for bit."""

import pytest
import torch
from oracle import GROUP
from torch.nn import Parameter

from merit_ds import Merit
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.ops import select_kernel
from merit_ds.ops.table import Operands, scalars_of
from merit_ds.phases import Plan
from merit_ds.reference import merit_step
from merit_ds.shard import Shard

SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STEPPED = GROUP | SETTINGS | {"decay_vectors": True}
SHAPES = [(768, 768), (301, 97), (1, 1), (5, 3), (3, 1025), (2049, 1), (50257, 64), (129,), (1,), (70001,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(shape, *, seed=0):
    return [part.squeeze(0) for part in torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).split(1)]


def expected(weight, grads, **settings):
    """The weight after steps by the reference, on the CPU."""
    weight = weight.clone()
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    for grad in grads:
        merit_step(weight, grad, *moments, **{**SETTINGS, **settings})
    return weight


def train(optimizer, weights, grads, *, steps=3):
    for _ in range(steps):
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.to(weight.device)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_many_weights_at_once(fused):
    pairs = [tensors(shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    weights = [Parameter(weight.cuda()) for weight, _ in pairs]
    train(Merit(weights, decay_vectors=True, fused=fused, **SETTINGS), weights, [grad for _, grad in pairs])
    for weight, (start, grad) in zip(weights, pairs, strict=True):
        assert torch.equal(weight.cpu(), expected(start, [grad] * 3)), tuple(start.shape)


def test_more_weights_than_one_launch_holds():
    pairs = [tensors((3, 5), seed=seed) for seed in range(2500)]
    weights = [Parameter(weight.cuda()) for weight, _ in pairs]
    train(Merit(weights, fused=True, **SETTINGS), weights, [grad for _, grad in pairs], steps=1)
    for weight, (start, grad) in zip(weights, pairs, strict=True):
        assert torch.equal(weight.cpu(), expected(start, [grad]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_every_dtype(dtype, grad_dtype):
    start, grad = tensors((67, 130))
    start, grad = start.to(dtype), grad.to(grad_dtype)
    kernel = select_kernel(torch.device("cuda"), fused=True)
    weight, m, v = start.cuda(), torch.zeros(67, 130, device="cuda"), torch.zeros(67, 130, device="cuda")
    layout = ShardLayout.build([Matrix(0, 67, 130)], bounds=[0, 67 * 130], rank=0)
    plan = Plan.build([Shard(weight, layout, (), wrapper="none")], groups=[0])
    kernel.step(
        kernel.preparer([weight.numel()], weight.device)(Operands([weight], [grad.cuda()], [m], [v])),
        tiles=kernel.table(plan.alone, weight.device),
        scalars=torch.tensor(scalars_of(STEPPED), device="cuda"),
        maxima=torch.zeros(plan.slots, 2, device="cuda"),
    )
    wanted = expected(start.float(), [grad.float()]).to(dtype)
    assert torch.equal(weight.cpu(), wanted)


def test_special_values():
    start, grad = tensors((33, 65))
    start[0], start[:, 3] = 0, 0
    start[5, 5], grad[6, 6], grad[7, 7], grad[8, 8] = 1e-40, float("inf"), float("nan"), 1e-42
    weight = Parameter(start.cuda())
    train(Merit([weight], fused=True, **SETTINGS), [weight], [grad], steps=1)
    wanted = expected(start, [grad])
    assert torch.equal(weight.isnan().cpu(), wanted.isnan())
    assert torch.equal(weight.nan_to_num(nan=7).cpu(), wanted.nan_to_num(nan=7))


@pytest.mark.parametrize("bounds", [[0, 10_000, 29_197], [0, 3, 301 * 50 + 7, 301 * 50 + 8, 29_197]])
def test_cut_anywhere(bounds):
    """The ranks' slices, all on one GPU; the all-reduce is a maximum over their buffers."""
    start, grad = tensors((29_197,))
    matrices = [Matrix(0, 97, 301)]
    device, kernel = torch.device("cuda", 0), select_kernel(torch.device("cuda"), fused=True)
    ranks = []
    for rank in range(len(bounds) - 1):
        piece = slice(bounds[rank], bounds[rank + 1])
        weight = start[piece].to(device)
        shard = Shard(weight, ShardLayout.build(matrices, bounds=bounds, rank=rank), (), "none", group="all")
        plan = Plan.build([shard], groups=[0])
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        prepare = kernel.preparer([weight.numel()], device)
        operands = prepare(Operands([weight], [grad[piece].to(device)], *([m] for m in moments)))
        arguments = {
            "tiles": kernel.table(plan.cut, device),
            "scalars": torch.tensor(scalars_of(STEPPED), device=device),
            "maxima": torch.zeros(plan.slots, 2, device=device),
        }
        kernel.accumulate(operands, **arguments)
        ranks.append((weight, plan.data[0], operands, arguments))
    shared = [arguments["maxima"][region.begin : region.end] for _, region, _, arguments in ranks]
    largest = torch.stack(shared).amax(0)
    for part in shared:
        part.copy_(largest)
    for _, _, operands, arguments in ranks:
        kernel.apply(operands, **arguments)
    ours = torch.cat([weight for weight, *_ in ranks]).cpu()
    assert torch.equal(ours, expected(start.view(97, 301), [grad.view(97, 301)]).view(-1))


def test_a_cuda_graph_follows_the_learning_rate_and_the_overflow_flag():
    start, grad = tensors((129, 70))
    weight = Parameter(start.cuda())
    weight.grad = grad.cuda()
    lr, found_inf = torch.tensor(0.02, device="cuda"), torch.zeros((), device="cuda")
    optimizer = Merit([weight], **{**SETTINGS, "lr": lr}, fused=True)
    optimizer.found_inf = found_inf
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    moments = torch.zeros_like(start), torch.zeros_like(start)
    merit_step(start, grad, *moments, **SETTINGS)
    for step, overflow in ((0.02, 0), (0.5, 0), (0.5, 1), (0.01, 0)):
        lr.fill_(step)
        found_inf.fill_(overflow)
        graph.replay()
        if not overflow:
            merit_step(start, grad, *moments, **{**SETTINGS, "lr": step})
        assert torch.equal(weight.detach().cpu(), start)


def test_the_current_stream_is_used():
    start, grad = tensors((512, 512))
    weight = Parameter(torch.zeros(512, 512, device="cuda"))
    optimizer = Merit([weight], fused=True, **SETTINGS)
    weight.grad, there = grad.cuda(), start.cuda()
    optimizer.step()  # builds the tables, for which the host waits
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][moment].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # the step must not overtake what comes before it on its stream
        weight.data.copy_(there)
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(weight.detach().cpu(), expected(start, [grad]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_on_another_gpu_than_the_current_one():
    pairs = [tensors((129, 70), seed=seed) for seed in range(2)]
    weights = [Parameter(start.to(f"cuda:{device}")) for device, (start, _) in enumerate(pairs)]
    torch.cuda.set_device(0)
    train(Merit(weights, fused=True, **SETTINGS), weights, [grad for _, grad in pairs])
    assert torch.cuda.current_device() == 0
    for weight, (start, grad) in zip(weights, pairs, strict=True):
        assert torch.equal(weight.cpu(), expected(start, [grad] * 3))


def test_one_launch_for_each_pass():
    weights = [Parameter(torch.randn(64, 64, device="cuda")) for _ in range(300)]
    optimizer = Merit(weights, fused=True, **SETTINGS)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if "_tiles" in event.name]
    assert len(launched) == 2, launched  # so many weights' addresses fit one launch's parameters since CUDA 12.1
