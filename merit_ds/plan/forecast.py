# SPDX-License-Identifier: Apache-2.0
"""A launch forecast: memory by ZeRO stage, what is sent, and how long it may take, from the recipe and the GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from merit_ds.errors import InputError
from merit_ds.plan.exchange import Exchange, exchange_of
from merit_ds.plan.memory import Memory, memory_of
from merit_ds.plan.optimizers import Optimizer, optimizer_groups, optimizer_of
from merit_ds.plan.paper import MicroBatch, Span, paper_model, run_micro_batch
from merit_ds.plan.sizes import Sizes, Spread
from merit_ds.plan.timing import Assumptions, Cluster, StepTime, step_time
from merit_ds.plan.wire import Transfer, transfers_of
from merit_ds.plan.wrapper import with_stage, wrapper_of
from merit_ds.training.config import Config, padded_vocab
from merit_ds.training.deepspeed_config import model_dtype, section
from merit_ds.training.plan import Plan, plan_of
from merit_ds.training.report import flops_per_sequence
from merit_ds.training.tokenizer import ByteTokenizer, Gpt2Tokenizer

STAGES = (0, 1, 2)
"""Of ZeRO, that the trainer supports."""
_VOCABULARY = {tokenizer.name: tokenizer.vocab_size for tokenizer in (ByteTokenizer, Gpt2Tokenizer)}
_SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Paper:
    """A recipe's model on paper, and what follows from it for any number of ranks. Made by `on_paper`.

    Attributes:
        groups: of the optimizer, as the trainer makes them.
        sizes: of one tensor-parallel rank's parameters.
        parameters: trained ones of the whole model.
        optimizer: the JSON's.
    """

    config: Config
    groups: list[dict[str, Any]]
    sizes: Sizes
    parameters: int
    optimizer: Optimizer
    one: MicroBatch
    two: MicroBatch
    _exchanges: dict[tuple[int, bool], Exchange] = field(default_factory=dict)

    @property
    def moments(self) -> list[int]:
        """Of each group that `sizes` has."""
        trained = [group for group in self.groups if any(p.requires_grad for p in group["params"])]
        return [1 if group.get("use_muon") else self.optimizer.moments for group in trained]

    def exchange(self, *, ranks: int, sharded: bool) -> Exchange:
        """For a number of data-parallel ranks; thousands of them take a moment."""
        if (ranks, sharded) not in self._exchanges:
            tensor_ranks = self.config.model.tensor_parallel
            self._exchanges[ranks, sharded] = exchange_of(
                self.optimizer, self.groups, ranks=ranks, sharded=sharded, tensor_ranks=tensor_ranks
            )
        return self._exchanges[ranks, sharded]

    def micro_batch(self, sequences: int) -> MicroBatch:
        """Of any size: all tensors and messages grow by as much with each sequence."""

        def line(first: int, second: int) -> int:
            return first + (sequences - 1) * (second - first)

        one, two = self.one, self.two
        spans = (
            Span(first.elements, line(first.peak, second.peak), line(first.end, second.end))
            for first, second in zip(one.spans, two.spans, strict=True)
        )
        sent = {kind: line(first, two.tensor_bytes[kind]) for kind, first in one.tensor_bytes.items()}
        return MicroBatch(tuple(spans), sent, one.tensor_calls)

    @property
    def flops_per_sequence(self) -> float:
        """Model FLOPs, forward and backward."""
        model = self.config.model
        rows = padded_vocab(_VOCABULARY[self.config.data.tokenizer], multiple=model.vocab_multiple)
        return flops_per_sequence(model, vocab_rows=rows)


@dataclass(frozen=True)
class Estimate:
    """One way to run a step.

    Attributes:
        micro_batch: sequences.
        ranks: data-parallel ones.
        mfu: model FLOP/s by the GPUs' data-sheet FLOP/s.
        days: of the whole run's steps.
    """

    stage: int
    micro_batch: int
    accumulation: int
    ranks: int
    memory: Memory
    transfers: list[Transfer]
    time: StepTime
    mfu: float
    tokens_per_second: float
    days: float


@dataclass(frozen=True)
class Stage:
    """What a ZeRO stage would hold.

    Attributes:
        estimate: with the recipe's micro-batch; None where the trainer refuses the stage.
        largest: micro-batch that fits the GPU and divides the batch; 0 where none does.
        refusal: why there is no estimate.
    """

    stage: int
    wrapper: str
    estimate: Estimate | None
    largest: int
    refusal: str | None = None


@dataclass(frozen=True)
class Forecast:
    """All that is said of a launch."""

    plan: Plan
    paper: Paper
    cluster: Cluster
    assumed: Assumptions
    recipe: Estimate
    stages: list[Stage]

    @property
    def usable_memory(self) -> float:
        """Bytes."""
        return self.cluster.gpu.memory * self.assumed.usable_memory

    @property
    def fits(self) -> bool:
        """Whether the recipe's own set-up does."""
        return self.recipe.memory.total <= self.usable_memory


@contextmanager
def on_paper(config: Config, ds_config: dict[str, Any]) -> Iterator[Paper]:
    """Build the recipe's model on paper. Its tensor-parallel group lasts as long as the context.

    Raises:
        InputError: the model cannot be built, or the plan does not know the optimizer.
    """
    optimizer = optimizer_of(ds_config)
    vocabulary = _VOCABULARY[config.data.tokenizer]
    with paper_model(config.model, vocab_size=vocabulary, dtype=model_dtype(ds_config)) as model:
        groups = optimizer_groups(ds_config, dict(model.named_parameters()))
        trained = [tuple(p.numel() for p in group["params"] if p.requires_grad) for group in groups]
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        one, two = (run_micro_batch(model, sequences=count, seq_length=config.model.seq_length) for count in (1, 2))
        yield Paper(
            config=config,
            groups=groups,
            sizes=Sizes(tuple(sizes for sizes in trained if sizes), frozen),
            parameters=sum(_whole_size(p, config) for p in model.parameters() if p.requires_grad),
            optimizer=optimizer,
            one=one,
            two=two,
        )


def forecast(paper: Paper, ds_config: dict[str, Any], cluster: Cluster, assumed: Assumptions) -> Forecast:
    """Work out everything for one cluster.

    Raises:
        InputError: what the trainer refuses too: the batch, the schedule or the model does not fit these GPUs.
    """
    plan = plan_of(paper.config, ds_config, world=cluster.gpus)
    recipe = estimate(paper, ds_config, cluster, assumed, micro_batch=plan.batch.micro_batch)
    stages = [_stage(paper, with_stage(ds_config, stage), cluster, assumed) for stage in STAGES]
    return Forecast(plan, paper, cluster, assumed, recipe, stages)


def estimate(
    paper: Paper, ds_config: dict[str, Any], cluster: Cluster, assumed: Assumptions, *, micro_batch: int
) -> Estimate:
    """One set-up: the JSON, but for its micro-batch.

    Raises:
        InputError: as `forecast`.
    """
    changed = ds_config | {"train_micro_batch_size_per_gpu": micro_batch}
    plan = plan_of(paper.config, changed, world=cluster.gpus)
    model, batch, wrapper, sizes = paper.config.model, plan.batch, wrapper_of(changed), paper.sizes
    spread = Spread(cluster.gpus // model.tensor_parallel, model.tensor_parallel, batch.accumulation)
    exchange = paper.exchange(ranks=spread.ranks, sharded=wrapper.shards)
    passes = paper.micro_batch(micro_batch)
    transfers = transfers_of(wrapper, paper.optimizer, exchange, sizes, spread, passes)
    memory = memory_of(
        wrapper,
        sizes,
        passes.spans,
        spread,
        moments=paper.moments,
        scratch=exchange.kept_slots * paper.optimizer.slot_bytes,
    )
    flops = paper.flops_per_sequence * batch.global_batch
    done = flops * (4 / 3 if model.activation_checkpointing else 1)  # the forward pass a second time
    time = step_time(cluster, assumed, wrapper, paper.optimizer, sizes, spread, transfers, flops=done / cluster.gpus)
    return Estimate(
        stage=wrapper.stage,
        micro_batch=micro_batch,
        accumulation=batch.accumulation,
        ranks=spread.ranks,
        memory=memory,
        transfers=transfers,
        time=time,
        mfu=flops / time.total / cluster.gpus / cluster.gpu.rate(wrapper.dtype),
        tokens_per_second=batch.global_batch * model.seq_length / time.total,
        days=plan.steps * time.total / _SECONDS_A_DAY,
    )


def _stage(paper: Paper, ds_config: dict[str, Any], cluster: Cluster, assumed: Assumptions) -> Stage:
    stage = section(ds_config, "zero_optimization")["stage"]
    try:
        plan = plan_of(paper.config, ds_config, world=cluster.gpus)
        wrapper = wrapper_of(ds_config)
    except InputError as error:
        return Stage(stage, "", None, 0, refusal=str(error))
    batch, ranks = plan.batch, cluster.gpus // paper.config.model.tensor_parallel
    share = batch.global_batch // ranks
    usable = cluster.gpu.memory * assumed.usable_memory

    def at(micro_batch: int) -> Estimate:
        return estimate(paper, ds_config, cluster, assumed, micro_batch=micro_batch)

    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    largest = next((size for size in sizes if at(size).memory.total <= usable), 0)
    return Stage(stage, wrapper.kind, at(batch.micro_batch), largest)


def _whole_size(parameter: torch.Tensor, config: Config) -> int:
    split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.numel() * (config.model.tensor_parallel if split else 1)
