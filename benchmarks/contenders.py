# SPDX-License-Identifier: Apache-2.0
"""The optimizer steps that benchmarks/optimizer_step.py holds against each other, over the same weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from merit_ds import Merit
from merit_ds.layout import Matrix, ShardLayout
from merit_ds.ops import select_kernel
from merit_ds.ops.table import Operands, scalars_of
from merit_ds.payload import flat_matrices, zero_bounds
from merit_ds.phases import Plan
from merit_ds.reference import merit_step
from merit_ds.shard import Shard, logical_matrices

Step = Callable[[], Any]
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
GROUP = {**SETTINGS, "clip": 1.0, "decay_vectors": False, "eps_inside_sqrt": False}


def gpt2_small(device: torch.device) -> list[Parameter]:
    """GPT-2 small's 148 weights, [out, in], with gradients."""
    width = 768
    shapes: list[tuple[int, ...]] = [(50257, width), (1024, width)]
    for _ in range(12):
        for rows, cols in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            shapes += [(rows, cols), (rows,)]
        shapes += [(width,)] * 4
    shapes += [(width,)] * 2
    draw = torch.Generator(device).manual_seed(0)
    weights = [Parameter(0.02 * torch.randn(shape, generator=draw, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=draw, device=device)
    return weights


def contenders(weights: Sequence[Parameter]) -> dict[str, Step]:
    """Every step by its name; all change the same weights."""
    adamw = {
        f"torch AdamW {kind}": torch.optim.AdamW(weights, **SETTINGS, **options).step
        for kind, options in {
            "fused": {"fused": True},
            "foreach": {"foreach": True},
            "loop": {"foreach": False},
        }.items()
    }
    found: dict[str, Step] = {"copy": _copy(weights), **adamw}
    if weights[0].device.type == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam"] = DeepSpeedCPUAdam(weights, **SETTINGS).step
    both, first, second = passes(weights, _all_cut(weights))
    return found | {
        "LAMB foreach": _lamb(weights),
        "Merit fused, whole": Merit(weights, fused=True, **SETTINGS).step,
        "Merit fused, all cut": both,
        "Merit fused, pass 1": first,
        "Merit fused, pass 2": second,
        "Merit eager": Merit(weights, fused=False, **SETTINGS).step,
        "MERIT's plain formula": _plain(weights),
    }


def zero_slice(weights: Sequence[Parameter], *, ranks: int, rank: int) -> Step:
    """The step of one rank's slice under ZeRO-1/2, without the exchange."""
    matrices, length = flat_matrices(weights)
    layout = ShardLayout.build(matrices, bounds=zero_bounds(length, ranks), rank=rank)
    return passes([torch.zeros(zero_bounds(length, ranks)[1], device=weights[0].device)], layout)[0]


def passes(weights: Sequence[Tensor], layout: ShardLayout) -> tuple[Step, Step, Step]:
    """The kernels' work for one rank's layout, of a flat tensor or of several taken as one; no other rank is asked.

    Returns:
        All of it, and of that the first and the second pass over what is cut.
    """
    flat = torch.cat([weight.detach().view(-1) for weight in weights])
    device, kernel = flat.device, select_kernel(flat.device, fused=True)
    shard = Shard(flat, layout, matrices=(), wrapper="none", group="the other ranks")  # type: ignore[arg-type]
    plan = Plan.build([shard], groups=[0])
    cut, alone = (kernel.table(tiles, device) if tiles else None for tiles in (plan.cut, plan.alone))
    grad = torch.full_like(flat, 1e-3)
    prepare = kernel.preparer([flat.numel()], device)
    operands = prepare(Operands([flat], [grad], [torch.zeros_like(flat)], [torch.zeros_like(flat)]))
    maxima = torch.zeros(plan.slots, 2, device=device)
    arguments = {"scalars": torch.tensor(scalars_of(GROUP), device=device), "maxima": maxima}

    def run(operation: Callable[..., None], tiles: Tensor | None) -> None:
        if tiles is not None:
            operation(operands, tiles=tiles, **arguments)

    def step() -> None:
        maxima.zero_()
        run(kernel.accumulate, cut)
        run(kernel.step, alone)
        run(kernel.apply, cut)

    return step, partial(run, kernel.accumulate, cut), partial(run, kernel.apply, cut)


def _all_cut(weights: Sequence[Parameter]) -> ShardLayout:
    """Of each weight all but its last element lies on this rank."""
    layouts, offsets, end = [], [], 0
    for weight in weights:
        matrices: list[Matrix] = logical_matrices(weight, {})
        layouts.append(ShardLayout.build(matrices, bounds=[0, weight.numel() - 1, weight.numel()], rank=0))
        offsets.append(end)
        end += weight.numel()
    return ShardLayout.concatenate(layouts, offsets=offsets)


def _copy(weights: Sequence[Parameter]) -> Step:
    """Reads and writes as many bytes as the weights have."""
    source = torch.ones(sum(weight.numel() for weight in weights), device=weights[0].device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@torch.no_grad()
def _lamb(weights: Sequence[Parameter]) -> Step:
    """LAMB (arXiv 1904.00962) by torch's foreach operations: one l2 trust ratio a weight."""
    m, v = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    (beta1, beta2), eps, decay, lr = (SETTINGS[name] for name in ("betas", "eps", "weight_decay", "lr"))

    @torch.no_grad()
    def step() -> None:
        grads = [weight.grad for weight in weights]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, eps)
        updates = torch._foreach_div(m, roots)
        torch._foreach_add_(updates, weights, alpha=decay)
        ratios = torch._foreach_div(torch._foreach_norm(weights), torch._foreach_norm(updates))
        torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(weights, updates, alpha=-lr)

    return step


def _plain(weights: Sequence[Parameter]) -> Step:
    """merit_ds/reference.py, the formula on whole tensors."""
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]

    @torch.no_grad()
    def step() -> None:
        for weight, (m, v) in zip(weights, moments, strict=True):
            merit_step(weight, weight.grad, m, v, **SETTINGS)

    return step
