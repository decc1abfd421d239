# SPDX-License-Identifier: Apache-2.0
"""The Gauss-Newton diagonal that Sophia-G needs (arXiv 2305.14342, algorithm 2), every few steps.

Labels are drawn from the model's own predictions. The gradient g of the mean loss over these labels, of B tokens, then
gives B * g * g, whose expectation is the diagonal of the Gauss-Newton matrix of the mean loss. B counts tokens, since
each token is an example with a prediction of its own; Sophia's published code counts so as well.

The passes go beside the DeepSpeed engine: forward through its module, backward by `torch.autograd.grad`, which runs
none of the hooks by which ZeRO collects gradients.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from merit_ds.errors import InputError
from merit_ds.log import user_logger
from merit_ds.training.agreement import agree
from merit_ds.training.dataset import Sequences, micro_batches
from merit_ds.training.deepspeed_config import model_dtype
from merit_ds.training.parallel import gather_vocabulary
from merit_ds.training.plan import Plan
from merit_ds.training.setup import Data


class GaussNewton:
    """Feeds an optimizer that has `update_hessian(gradients, *, examples)`, as `MeritSophiaG` has; no other.

    Its groups' `hessian_interval` is the steps between two estimates, of which the first is made before step 0;
    `hessian_sequences` the sequences of one: the first ones of the step's batch, at most all of it.

    Raises:
        InputError: float16, whose gradients would vanish without a loss scale; or recomputation on a GPU, which
            Megatron-core's does not allow outside `backward`.
    """

    def __init__(self, engine: Any, plan: Plan, data: Data) -> None:
        self._engine, self._plan, self._data = engine, plan, data
        self._optimizer = engine.basic_optimizer if hasattr(engine.basic_optimizer, "update_hessian") else None
        if self._optimizer is None:
            return
        name = type(self._optimizer).__name__
        if model_dtype(plan.ds_config) == torch.float16:
            raise InputError(f"fp16.enabled with {name}: its Hessian has no loss scale; use bf16")
        if plan.config.model.activation_checkpointing and plan.device.type == "cuda":
            raise InputError(f"model.activation_checkpointing with {name} on a GPU is not supported; set it to false")

    def before_step(self, step: int) -> None:
        """Make an estimate, if one is due, with the weights as they are. A collective.

        Args:
            step: optimizer steps done.
        """
        if self._optimizer is None:
            return
        plan, settings = self._plan, self._optimizer.param_groups[0]
        if step % settings["hessian_interval"]:
            return
        batch = plan.batch.global_batch
        sequences = min(settings["hessian_sequences"], batch)
        if step == 0 and plan.rank == 0:
            text = "the Hessian is estimated every %d steps from %d of the batch's %d sequences"
            user_logger().info(text, settings["hessian_interval"], sequences, batch)
        gradients, tokens = sampled_gradients(
            self._engine.module,
            self._data.train,
            start=step * batch,
            stop=step * batch + sequences,
            micro_batch=plan.batch.micro_batch,
            vocab_size=self._data.tokenizer.vocab_size,
            seed=plan.config.run.seed,
            device=plan.device,
        )
        spoilt = any(not gradient.isfinite().all() for gradient in gradients)
        if agree([int(spoilt)], device=plan.device)[0]:
            # The moving average would never forget it, and DeepSpeed's overflow check does not see this path.
            user_logger().warning("step %d: the Hessian's estimate is not finite and is left out", step)
            return
        self._optimizer.update_hessian(gradients, examples=tokens)


def sampled_gradients(
    model: Any,
    dataset: Sequences,
    *,
    start: int,
    stop: int,
    micro_batch: int,
    vocab_size: int,
    seed: int,
    device: torch.device,
) -> tuple[list[torch.Tensor], int]:
    """The gradient of the mean loss of the sequences [start, stop), with labels drawn from the model. A collective.

    The draw depends on the seed and the sequence's number alone, so the result does not depend on the number of ranks,
    up to the rounding of sums and, where that moves a prediction across the drawn number, a token in a million.

    Args:
        model: as `build_model` returns it, in training mode; its parameters' `grad` stay as they are.
        dataset: of which each data-parallel rank takes its share, as in training.
        micro_batch: sequences of one forward pass.
        vocab_size: tokens that may be drawn: the rows that pad the vocabulary are none.

    Returns:
        The gradients, float32, one of its shape for each trainable parameter in the model's order, the same on all
        data-parallel ranks; and the tokens over which the mean goes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=device)
    parts = torch.split(flat, sizes)
    sums = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = micro_batches(dataset, start=start, stop=stop, micro_batch=micro_batch, rank=rank, world=world)
    for index, samples in enumerate(share):
        first = start + (index * world + rank) * micro_batch
        samples = {key: value.to(device) for key, value in samples.items()}
        logits = model(samples["tokens"], samples["position_ids"], None)
        labels = draw_labels(logits.detach(), vocab_size=vocab_size, seed=seed, first=first)
        per_token = model.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
        count = samples["loss_mask"].sum()
        loss = (per_token * samples["loss_mask"]).sum() / count
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total.add_(gradient.float() * count)
        tokens += count
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(flat, group=group)
    dist.all_reduce(tokens, group=group)
    flat /= tokens
    return sums, int(tokens)


def draw_labels(logits: torch.Tensor, *, vocab_size: int, seed: int, first: int) -> torch.Tensor:
    """One token for each position, drawn from the softmax over the real tokens. A collective of the tensor-parallel
    ranks.

    Args:
        logits: [b, s, rows of this rank].
        vocab_size: tokens, the first rows of the whole vocabulary.
        seed: of the draw.
        first: number of the first of these sequences in the whole training data.

    Returns:
        [b, s] int64, the same on all tensor-parallel ranks.
    """
    labels = []
    for number, own in enumerate(logits, start=first):  # one by one: a whole micro-batch's float64 would be gigabytes
        # A float32 sum would lose the tokens whose probability is below its rounding.
        bounds = gather_vocabulary(own)[:, :vocab_size].float().softmax(-1).double().cumsum(-1)
        drawn = torch.from_numpy(np.random.default_rng([seed, number]).random(len(own))).to(own.device)
        chosen = torch.searchsorted(bounds, drawn.unsqueeze(1) * bounds[:, -1:], right=True).squeeze(1)
        labels.append(chosen.clamp_(max=vocab_size - 1))
    drawn_labels = torch.stack(labels)
    # A GPU's cumulative sum may differ in its last bits from rank to rank, and the loss needs the same label on all.
    source = parallel_state.get_tensor_model_parallel_src_rank()
    dist.broadcast(drawn_labels, source, group=parallel_state.get_tensor_model_parallel_group())
    return drawn_labels
