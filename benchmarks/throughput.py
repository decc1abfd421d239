# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the trainer against a plain PyTorch loop, in one run.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --recipe configs/gpt2_small_1k.yaml --ranks 8

The trainer is what pretrain_gpt.py runs: Megatron-core's GPT under DeepSpeed, with the recipe's optimizer and ZeRO
stage. The plain loop is benchmarks/plain_loop.py: the same shapes in torch.nn, DDP, fused AdamW. Both live in the same
processes, with the same ranks, threads, dtype, micro-batch, accumulation and attention kernel, and take turns in
blocks of whole steps. Evaluation, saving and log lines are in neither. The result is trainer / plain: the median over
the pairs of neighbouring blocks.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from merit_ds.errors import InputError
from merit_ds.training.cli import report_errors
from merit_ds.training.config import load_config
from merit_ds.training.deepspeed_config import model_dtype, section
from merit_ds.training.plan import Plan, make_plan
from merit_ds.training.report import provenance

BENCHMARKS = Path(__file__).resolve().parent
WANTED = 0.95


@dataclass(frozen=True)
class Settings:
    """The command line."""

    recipe: Path
    overrides: list[str]
    ranks: int
    blocks: int
    steps_per_block: int
    output: Path


def main() -> None:
    settings = _settings()
    start_ranks(_rank_main, settings.ranks, settings)


def start_ranks(rank_main: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run `rank_main(rank, *arguments)` in `ranks` processes, and exit as the first that fails."""
    os.environ.update(
        WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        mp.spawn(rank_main, args=arguments, nprocs=ranks)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)  # a rank has said why


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=BENCHMARKS / "large_batch.yaml",
        metavar="YAML",
        help="what is trained, on its own prepared data (default: benchmarks/large_batch.yaml)",
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
        type=positive,
        default=torch.cuda.device_count() or 2,
        metavar="N",
        help="processes; without GPUs each gets cores / N threads, or OMP_NUM_THREADS (default: the GPUs, else 2)",
    )
    parser.add_argument(
        "--blocks",
        type=positive,
        default=12,
        metavar="N",
        help="blocks of each side; a pair of blocks gives one ratio (default: %(default)s)",
    )
    parser.add_argument(
        "--steps-per-block",
        type=positive,
        default=1,
        metavar="N",
        help="optimizer steps of a block; more where steps are short (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=BENCHMARKS / "results" / "throughput.json",
        metavar="JSON",
        help="where the numbers go (default: benchmarks/results/throughput.json)",
    )
    return Settings(**vars(parser.parse_args()))


def _rank_main(rank: int, settings: Settings) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with report_errors():
        _compare(settings)


def _compare(settings: Settings) -> None:
    # Megatron-core and DeepSpeed take seconds to import; --help and the process that starts the ranks need neither.
    from sides import build_sides
    from turns import WARM_UP_STEPS, part_seconds, take_turns

    from merit_ds.training import setup

    config = load_config(settings.recipe, overrides=[*settings.overrides, "run.save=null", "run.load=null"])
    plan = make_plan(config)
    _check(settings, plan, steps=WARM_UP_STEPS + (settings.blocks + 1) * settings.steps_per_block)
    setup.start_distributed(plan)
    sides = build_sides(plan)
    seconds = take_turns(sides, blocks=settings.blocks, steps=settings.steps_per_block, device=plan.device)
    tokens = plan.batch.global_batch * config.model.seq_length * settings.steps_per_block
    rates = {name: [tokens / block for block in blocks] for name, blocks in seconds.items()}
    parts = {
        name: part_seconds(side, steps=settings.steps_per_block, device=plan.device) for name, side in sides.items()
    }
    if plan.rank == 0:
        result = _result(rates, parts) | _circumstances(settings, plan, parameters=sides["plain"].parameters)
        _show(result)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {os.path.relpath(settings.output)}")
    dist.barrier()
    dist.destroy_process_group()


def _check(settings: Settings, plan: Plan, *, steps: int) -> None:
    """Refuse what the plain loop does not do, and more steps than the recipe's schedule has."""
    if model_dtype(plan.ds_config) == torch.float16:
        raise InputError(f"{settings.recipe}: the plain loop has no loss scaling for fp16; use float32 or bf16")
    if plan.config.model.activation_checkpointing:
        raise InputError(
            f"{settings.recipe}: the plain loop keeps its activations; add --set model.activation_checkpointing=false"
        )
    if steps > plan.steps:
        raise InputError(f"{settings.recipe}: its {plan.steps} steps are fewer than the {steps} here; lower --blocks")


def _result(rates: dict[str, list[float]], parts: dict[str, dict[str, float]]) -> dict[str, Any]:
    ratios = [trainer / plain for trainer, plain in zip(rates["trainer"], rates["plain"], strict=True)]
    return {
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "wanted": WANTED, "pairs": ratios},
        "tokens_per_second": {name: {"median": median(blocks), "blocks": blocks} for name, blocks in rates.items()},
        "seconds_per_step": parts,
    }


def _circumstances(settings: Settings, plan: Plan, *, parameters: int) -> dict[str, Any]:
    return {
        "recipe": os.path.relpath(settings.recipe, BENCHMARKS.parent),
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
        **provenance(),
    }


def _show(result: dict[str, Any]) -> None:
    parts = "".join(f"{part:>10}" for part in result["seconds_per_step"]["plain"])
    print(f"\n{'':8}{'tokens/s':>10}{'(min to max)':>18}   ms a step:{parts}")
    for name, rates in result["tokens_per_second"].items():
        spread = f"({min(rates['blocks']):.0f} to {max(rates['blocks']):.0f})"
        parts = "".join(f"{1000 * seconds:10.1f}" for seconds in result["seconds_per_step"][name].values())
        print(f"{name:8}{rates['median']:10.0f}{spread:>18}{'':13}{parts}")
    ratio = result["ratio"]
    print(
        f"trainer / plain: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}); wanted: {WANTED} or more"
    )


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
