# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism where Megatron-core and DeepSpeed meet: process groups, and gradients of replicated weights."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker


class MegatronGroups:
    """Megatron-core's process groups under the names by which DeepSpeed asks its `mpu`.

    DeepSpeed's "model parallel" ranks are those among which a layer is split. It adds the squared gradient norms of
    their parameters, and takes those that do not carry Megatron-core's `tensor_model_parallel` from the first rank.
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def sum_partial_gradients(model: torch.nn.Module) -> None:
    """Have the backward pass add up a gradient of which each tensor-parallel rank computes a part.

    A norm's weight is the same on all tensor-parallel ranks. Under sequence parallelism each of them sees only its
    share of the positions; Megatron-core marks such parameters by `sequence_parallel`. A norm of queries or keys sees
    the rank's own heads, with and without sequence parallelism; Megatron-core knows it by its name. It leaves the
    sums to a step of its own training loop (`finalize_model_grads`), which DeepSpeed does not run. Each micro-batch's
    gradient is summed as it comes, before DeepSpeed accumulates and reduces it: a small all-reduce for each such
    parameter, on all ranks of the group in the same order.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    group = parallel_state.get_tensor_model_parallel_group()

    def add_up(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()  # autograd may use the tensor elsewhere
        dist.all_reduce(total, group=group)
        return total

    for name, parameter in model.named_parameters():
        partial = getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
        if parameter.requires_grad and partial:
            parameter.register_hook(add_up)  # type: ignore[no-untyped-call]


def allow_sequence_parallel_on_cpu() -> None:
    """Make Megatron-core's sequence parallelism run without a GPU; call it on no machine that uses one.

    It takes its buffers from `torch.cuda.current_device()` and the random states of its dropout, which is zero here,
    from CUDA. Neither can be set otherwise.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """The logits of the whole vocabulary. A collective of the tensor-parallel ranks.

    Args:
        logits: [..., rows of this rank].

    Returns:
        [..., rows], the same bits on each of these ranks.
    """
    pieces = [torch.empty_like(logits) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(pieces, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(pieces, dim=-1)
