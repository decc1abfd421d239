# SPDX-License-Identifier: Apache-2.0
"""What tests with DeepSpeed engines share: a model, a record of Merit's steps, what lies where in ZeRO's buffers."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import merit_ds  # noqa: F401  (registers the optimizer)

SETTINGS = {"lr": 0.03, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
STEPS = 4


@dataclass(frozen=True)
class Case:
    """One DeepSpeed configuration: `zero` goes to zero_optimization, `extra` to the top level of the JSON."""

    name: str
    dtype: str = "fp32"
    groups: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, accumulation: int) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "Merit", "params": SETTINGS},
            "zero_optimization": self.zero,
            "steps_per_print": 1000,
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        return config | self.extra


class Shapes(torch.nn.Module):
    """Odd weights: cut mid-row by most rank counts, some smaller than the ranks, stacked, convolved, frozen, empty."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.1)

        self.matrix = weight(33, 17)
        self.vector = weight(13)
        self.row = weight(1, 29)
        self.frozen = weight(6, 7).requires_grad_(False)
        self.column = weight(31, 1)
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.single = weight(1)
        self.stack = weight(3, 5, 7)
        self.stack.matrix_view = "stack"
        self.convolution = weight(4, 3, 2, 2)
        self.convolution.matrix_view = "flatten"
        self.zeros = torch.nn.Parameter(torch.zeros(9, 11))
        self.wide = weight(2, 301)
        self.tiny = weight(3)

    def forward(self, step: int, rank: int) -> torch.Tensor:
        loss = torch.zeros(())
        for index, parameter in enumerate(self.parameters(recurse=False)):
            generator = torch.Generator().manual_seed(1000 * step + 100 * rank + index)
            target = torch.randn(parameter.shape, generator=generator)
            loss = loss + ((parameter.float() - target) ** 2).sum()
        return loss

    def groups(self, count: int) -> list[dict[str, Any]]:
        """The last group holds a single tiny vector, so most ranks own nothing of it."""
        named = dict(self.named_parameters())
        if count == 1:
            return [{"params": list(named.values())}]
        if count == 2:
            return [{"params": list(named.values())[:5]}, {"params": list(named.values())[5:], "weight_decay": 0.2}]
        first = [p for name, p in named.items() if name not in ("tiny", "wide", "vector")]
        return [
            {"params": [*first, named["wide"]], "weight_decay": 0.2},
            {"params": [named["vector"]]},
            {"params": [named["tiny"]], "lr": 0.01},
        ]


class Recorder:
    """Notes at each of Merit's steps the slices that it was given, and counts its MAX all-reduces."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.grads: list[torch.Tensor] = []
        self.calls = 0
        self.collectives = 0
        self._inside = False
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._counting
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def close(self) -> None:
        dist.all_reduce = self._all_reduce

    def _counting(self, tensor, op=dist.ReduceOp.SUM, *args, **kwargs):
        if self._inside:
            assert op == dist.ReduceOp.MAX and tensor.dtype == torch.int32
            self.collectives += 1
        return self._all_reduce(tensor, op, *args, **kwargs)

    def _before(self, optimizer, args, kwargs) -> None:
        self._inside = True
        self.calls += 1
        for group in optimizer.param_groups:
            self.grads += [tensor.grad.clone() for tensor in group["params"] if tensor.grad is not None]

    def _after(self, optimizer, args, kwargs) -> None:
        self._inside = False


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Every rank's slice, end to end."""
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


def logical_matrices(parameter: torch.nn.Parameter, flat: torch.Tensor) -> list[torch.Tensor]:
    """Views of a parameter's flat float32 values in the shape that MERIT sees."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a parameter without its own
    view = flat[: shape.numel()].view(shape)
    if len(shape) <= 2:
        return [view]
    return list(view) if parameter.matrix_view == "stack" else [view.flatten(1)]


def buffer_order(wrapper: Any) -> list[list[torch.nn.Parameter]]:
    """The order in which DeepSpeed really lays a group's parameters into its buffer."""
    return getattr(wrapper, "round_robin_bit16_groups", None) or wrapper.bf16_groups


def flat_partitions(wrapper: Any) -> list[torch.Tensor]:
    return getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition


def offsets(wrapper: Any, group: int) -> list[int]:
    """Start of each parameter in the group's buffer, by DeepSpeed's own account of padding where it has one."""
    known = getattr(wrapper, "round_robin_bit16_offsets", None)
    if known:
        return known[group]
    sizes = [parameter.numel() for parameter in buffer_order(wrapper)[group]]
    return [sum(sizes[:index]) for index in range(len(sizes))]
