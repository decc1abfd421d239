# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the trainer against a plain PyTorch loop, in one run.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --recipe configs/gpt2_small_1k.yaml --ranks 8

The trainer is what pretrain_gpt.py runs: Megatron-core's GPT under DeepSpeed with the recipe's optimizer and ZeRO
stage. The plain loop is benchmarks/plain_loop.py: the same shapes in torch.nn, DDP, fused AdamW. Both live in the same
processes, with the same ranks, threads, dtype, micro-batch, accumulation and attention kernel, and take turns in
blocks of whole steps, so that whatever else the machine does meets both. Evaluation, saving and log lines are in
neither. The result is the median, over pairs of neighbouring blocks, of trainer / plain.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from merit_ds.errors import InputError
from merit_ds.training.cli import report_errors
from merit_ds.training.config import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "throughput.json"
WANTED = 0.95
WARM_UP_STEPS = 2
SIDES = ("trainer", "plain")
PARTS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    recipe: Path
    overrides: list[str]
    ranks: int
    blocks: int
    steps_per_block: int
    output: Path


@dataclass
class Side:
    """One of the two that are compared.

    Attributes:
        train_step: one whole optimizer step; a collective.
        parts: the object whose methods PARTS make up most of a step.
        parameters: trainable ones.
    """

    train_step: Callable[[], Any]
    parts: Any
    parameters: int


def main() -> None:
    settings = _settings()
    os.environ.update(
        WORLD_SIZE=str(settings.ranks),
        LOCAL_SIZE=str(settings.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        mp.spawn(_rank_main, args=(settings,), nprocs=settings.ranks)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)  # the rank has said why


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=REPOSITORY / "configs" / "quickstart.yaml",
        metavar="YAML",
        help="what is trained; its data must be prepared (default: configs/quickstart.yaml)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a value of the recipe, as in pretrain_gpt.py; may be repeated",
    )
    parser.add_argument(
        "--ranks",
        type=_positive,
        default=torch.cuda.device_count() or 2,
        metavar="N",
        help="processes; on CPUs each gets cores / ranks threads, or OMP_NUM_THREADS (default: the GPUs, else 2)",
    )
    parser.add_argument(
        "--blocks",
        type=_positive,
        default=8,
        metavar="N",
        help="blocks of each side; every pair of blocks gives one ratio (default: %(default)s)",
    )
    parser.add_argument(
        "--steps-per-block",
        type=_positive,
        default=3,
        metavar="N",
        help="optimizer steps of a block: more for steadier blocks on short steps (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULT, metavar="JSON", help="default: benchmarks/results/throughput.json"
    )
    return Settings(**vars(parser.parse_args()))


def _rank_main(rank: int, settings: Settings) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with report_errors():
        _compare(settings)


def _compare(settings: Settings) -> None:
    # Megatron-core and DeepSpeed take seconds to import; --help and the launching process need neither.
    from merit_ds.training import setup

    config = load_config(settings.recipe, overrides=[*settings.overrides, "run.save=null", "run.load=null"])
    plan = setup.make_plan(config)
    _check(settings, plan)
    setup.start_distributed(plan)
    sides = {"trainer": _trainer(plan), "plain": _plain(plan)}
    counts = {name: side.parameters for name, side in sides.items()}
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the two models differ in size: {counts}")
    tokens = plan.batch.global_batch * config.model.seq_length
    seconds = _take_turns(sides, settings=settings, plan=plan)
    rates = {name: [tokens * settings.steps_per_block / block for block in seconds[name]] for name in SIDES}
    parts = {name: _part_seconds(side, steps=settings.steps_per_block, plan=plan) for name, side in sides.items()}
    if plan.rank == 0:
        result = _result(rates, parts) | _circumstances(settings, plan, parameters=counts["plain"])
        _show(result)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {os.path.relpath(settings.output)}")
    dist.barrier()
    dist.destroy_process_group()


def _check(settings: Settings, plan: Any) -> None:
    from merit_ds.training.deepspeed_config import model_dtype

    if model_dtype(plan.ds_config) == torch.float16:
        raise InputError(f"{settings.recipe}: the plain loop has no loss scaling for fp16; use float32 or bf16")
    if plan.config.model.activation_checkpointing:
        raise InputError(
            f"{settings.recipe}: the plain loop keeps its activations; add --set model.activation_checkpointing=false"
        )
    steps = WARM_UP_STEPS + (settings.blocks + 1) * settings.steps_per_block
    if steps > plan.steps:
        raise InputError(f"{steps} steps of each side are more than the recipe's {plan.steps}; lower --blocks")


def _trainer(plan: Any) -> Side:
    from merit_ds.training import setup
    from merit_ds.training.interrupt import Interrupt
    from merit_ds.training.trainer import Trainer

    datasets = setup.open_data(plan)
    engine = setup.wrap(plan, setup.build(plan))
    trainer = Trainer(engine, plan, datasets)

    def train_step() -> None:
        with Interrupt() as interrupt:
            signum = trainer._train_step(interrupt)
        if signum:
            sys.exit(128 + signum)

    return Side(train_step, engine, _trainable(engine.module))


def _plain(plan: Any) -> Side:
    from plain_loop import PlainLoop

    from merit_ds.training.data_manifest import split_prefix
    from merit_ds.training.deepspeed_config import model_dtype
    from merit_ds.training.model import padded_vocab

    config = plan.config
    loop = PlainLoop(
        config.model,
        rows=padded_vocab(plan.tokenizer.vocab_size, multiple=config.model.vocab_multiple),
        batch=plan.batch,
        tokens=Path(split_prefix(config.data.prefix, "train") + ".bin"),
        dtype=model_dtype(plan.ds_config),
        device=plan.device,
        rank=plan.rank,
    )
    return Side(loop.train_step, loop, _trainable(loop.ddp))


def _trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _take_turns(sides: dict[str, Side], *, settings: Settings, plan: Any) -> dict[str, list[float]]:
    """Seconds of each side's blocks. Every other pair runs in reverse, so that a drift favours neither side."""
    for side in sides.values():
        _block_seconds(side, steps=WARM_UP_STEPS, device=plan.device)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for block in range(settings.blocks):
        for name in SIDES if block % 2 == 0 else reversed(SIDES):
            seconds[name].append(_block_seconds(sides[name], steps=settings.steps_per_block, device=plan.device))
        if plan.rank == 0:
            spent = ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in SIDES)
            print(f"block {block + 1} of {settings.blocks}: {spent}", flush=True)
    return seconds


def _block_seconds(side: Side, *, steps: int, device: torch.device) -> float:
    """Wall time of whole steps, until the slowest rank is done."""
    _synchronize(device)
    dist.barrier()
    start = perf_counter()
    for _ in range(steps):
        side.train_step()
    _synchronize(device)
    dist.barrier()
    return perf_counter() - start


def _part_seconds(side: Side, *, steps: int, plan: Any) -> dict[str, float]:
    """This rank's seconds a step in each of PARTS and in the rest: data, flags, bookkeeping.

    It waits for the GPU around each part, so it takes one more block, after those that count.
    """
    spent = {part: 0.0 for part in PARTS}

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _synchronize(plan.device)
            start = perf_counter()
            result = method(*args, **kwargs)
            _synchronize(plan.device)
            spent[part] += perf_counter() - start
            return result

        return call

    for part in PARTS:
        setattr(side.parts, part, timed(part, getattr(side.parts, part)))
    total = _block_seconds(side, steps=steps, device=plan.device)
    spent["rest"] = total - sum(spent.values())
    return {part: value / steps for part, value in spent.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _result(rates: dict[str, list[float]], parts: dict[str, dict[str, float]]) -> dict[str, Any]:
    ratios = [trainer / plain for trainer, plain in zip(rates["trainer"], rates["plain"], strict=True)]
    return {
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "wanted": WANTED, "pairs": ratios},
        "tokens_per_second": {name: {"median": median(rates[name]), "blocks": rates[name]} for name in SIDES},
        "seconds_per_step": parts,
    }


def _circumstances(settings: Settings, plan: Any, *, parameters: int) -> dict[str, Any]:
    from merit_ds.training.deepspeed_config import model_dtype, section
    from merit_ds.training.report import provenance

    return {
        "recipe": os.path.relpath(settings.recipe, REPOSITORY),
        "overrides": settings.overrides,
        "optimizer": section(plan.ds_config, "optimizer").get("type"),
        "zero_stage": section(plan.ds_config, "zero_optimization").get("stage", 0),
        "model": plan.config.model.model_dump() | {"trainable_parameters": parameters},
        "batch": asdict(plan.batch),
        "dtype": str(model_dtype(plan.ds_config)).removeprefix("torch."),
        "device": plan.device.type,
        "ranks": plan.world,
        "threads_per_rank": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "blocks": settings.blocks,
        "steps_per_block": settings.steps_per_block,
    } | provenance()


def _show(result: dict[str, Any]) -> None:
    print(
        f"\n{'':8} {'tokens/s':>9} {'(min to max)':>17}   ms a step:"
        + "".join(f"{part:>10}" for part in (*PARTS, "rest"))
    )
    for name in SIDES:
        blocks = result["tokens_per_second"][name]["blocks"]
        spread = f"({min(blocks):.0f} to {max(blocks):.0f})"
        parts = "".join(f"{1000 * value:10.1f}" for value in result["seconds_per_step"][name].values())
        print(f"{name:8} {median(blocks):9.0f} {spread:>17} {'':13}{parts}")
    ratio = result["ratio"]
    print(
        f"trainer / plain: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}); wanted {WANTED} or more\n"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
