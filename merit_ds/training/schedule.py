# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the batch and of the learning-rate schedule, done before anything is built."""

from dataclasses import dataclass
from typing import Any

from merit_ds.errors import InputError
from merit_ds.training.deepspeed_config import section


@dataclass(frozen=True)
class Batch:
    """How a step's sequences are spread: global_batch = micro_batch * accumulation * data-parallel ranks.

    Attributes:
        global_batch: sequences of one optimizer step, over all ranks.
        micro_batch: sequences of one forward and backward on one data-parallel rank.
        accumulation: micro-batches of one step on one data-parallel rank.
    """

    global_batch: int
    micro_batch: int
    accumulation: int


def plan_batch(ds_config: dict[str, Any], *, ranks: int) -> Batch:
    """Work out the accumulation from the DeepSpeed JSON.

    Args:
        ds_config: with `train_batch_size` and `train_micro_batch_size_per_gpu`.
        ranks: data-parallel ranks: all ranks / model.tensor_parallel.

    Raises:
        InputError: a size is missing or not a positive integer; they do not fit together (the message proposes
            the nearest that do); or the JSON gives another `gradient_accumulation_steps`.
    """
    global_batch = _positive(ds_config, "train_batch_size")
    micro_batch = _positive(ds_config, "train_micro_batch_size_per_gpu")
    if global_batch % (micro_batch * ranks):
        raise InputError(_explain_misfit(global_batch, micro_batch, ranks))
    accumulation = global_batch // (micro_batch * ranks)
    given = ds_config.get("gradient_accumulation_steps", accumulation)
    if given != accumulation:
        raise InputError(
            f"gradient_accumulation_steps is {given!r}, but train_batch_size {global_batch} / train_micro_batch_size_"
            f"per_gpu {micro_batch} / {ranks} data-parallel ranks = {accumulation}; leave the key out"
        )
    return Batch(global_batch, micro_batch, accumulation)


def nearest_ranks(global_batch: int, micro_batch: int, *, ranks: int) -> list[int]:
    """The next smaller and the next larger number of data-parallel ranks over which the batch can be spread, if any.

    Args:
        ranks: from which to look; itself not among them.
    """
    most = global_batch // micro_batch
    fitting = [count for count in range(1, most + 1) if global_batch % (micro_batch * count) == 0]
    return [*[count for count in fitting if count < ranks][-1:], *[count for count in fitting if count > ranks][:1]]


def total_steps(train_tokens: int, *, batch: int, seq_length: int) -> int:
    """Optimizer steps that a token budget pays for: floor(tokens / sequences of a step / tokens of a sequence).

    Raises:
        InputError: the budget is smaller than one step.
    """
    steps = train_tokens // (batch * seq_length)
    if steps == 0:
        raise InputError(
            f"run.train_tokens {train_tokens} is less than one step of train_batch_size {batch} "
            f"x model.seq_length {seq_length} = {batch * seq_length} tokens"
        )
    return steps


def check_scheduler(ds_config: dict[str, Any], *, steps: int) -> None:
    """Refuse a schedule that was made for another number of steps.

    The warm-up's length is the user's choice as long as it ends within the run; the recipes warm up for 2 %.
    Schedules without `total_num_steps` have nothing to disagree with, but WarmupCosineLR must have it.

    Args:
        ds_config: the DeepSpeed JSON; without a `scheduler` the learning rate is constant.
        steps: optimizer steps of the run, from `total_steps`.

    Raises:
        InputError: with both numbers.
    """
    kind = section(ds_config, "scheduler").get("type")
    params = section(ds_config, "scheduler", "params")
    total = params.get("total_num_steps")
    if total is None and kind != "WarmupCosineLR":
        return
    if total != steps:
        raise InputError(
            f"scheduler.params.total_num_steps is {total!r}, but the token budget gives {steps} steps; "
            "set it to that, or change run.train_tokens or train_batch_size"
        )
    warmup = _positive(params, "warmup_num_steps", where="scheduler.params.")
    if warmup >= steps:
        raise InputError(
            f"scheduler.params.warmup_num_steps is {warmup}, but the run has {steps} steps; "
            f"make it smaller, for instance 2 %: {max(1, round(steps / 50))}"
        )


def _positive(values: dict[str, Any], key: str, *, where: str = "") -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        got = f"is {value!r}" if key in values else "is missing"
        raise InputError(f"{where}{key} {got}; it must be a positive integer")
    return value


def _explain_misfit(global_batch: int, micro_batch: int, ranks: int) -> str:
    quantum = micro_batch * ranks
    below = global_batch // quantum * quantum
    sizes = [str(size) for size in (below, below + quantum) if size]
    choices = [f"train_batch_size {' or '.join(sizes)}"]
    if global_batch % ranks == 0:
        per_rank = global_batch // ranks
        fitting = max(size for size in range(1, micro_batch + 1) if per_rank % size == 0)
        choices.append(f"train_micro_batch_size_per_gpu {fitting}")
    counts = nearest_ranks(global_batch, micro_batch, ranks=ranks)
    if counts:
        choices.append(f"{' or '.join(map(str, counts))} data-parallel rank{'s' if counts[-1] > 1 else ''}")
    return (
        f"train_batch_size {global_batch} is no multiple of train_micro_batch_size_per_gpu {micro_batch} x "
        f"{ranks} data-parallel ranks = {quantum}; the nearest that fit: {', or '.join(choices)}"
    )
