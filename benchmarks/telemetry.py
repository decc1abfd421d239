# SPDX-License-Identifier: Apache-2.0
"""What telemetry costs: steps of the trainer with a sample against steps without, in one run.

    python benchmarks/telemetry.py
    python benchmarks/telemetry.py --recipe configs/gpt2_small_1k.yaml --ranks 8

One trainer, as pretrain_gpt.py runs it, takes turns in blocks of whole steps: in one block each step is sampled, all
values, written to telemetry.jsonl and to the recipe's monitors that write files; in the other none is. From the
difference follows what the recipe's default `telemetry.interval` costs: (with - without) / (interval * without). The
result is the median over the pairs of neighbouring blocks. The default recipe is the dearest: its steps are short, and
a sample's one micro-batch is all that a rank has in a step.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from throughput import BENCHMARKS, positive, start_ranks

from merit_ds.training.cli import report_errors
from merit_ds.training.config import TelemetryConfig, load_config
from merit_ds.training.plan import Plan, make_plan
from merit_ds.training.report import add_row, provenance

WANTED = 0.01
INTERVAL = TelemetryConfig().interval


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
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank_main, settings.ranks, settings, Path(folder))


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=BENCHMARKS.parent / "configs" / "quickstart.yaml",
        metavar="YAML",
        help="what is trained, on its own prepared data (default: configs/quickstart.yaml)",
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
        help="processes (default: the GPUs, else 2)",
    )
    parser.add_argument("--blocks", type=positive, default=12, metavar="N", help="of each side (default: %(default)s)")
    parser.add_argument(
        "--steps-per-block", type=positive, default=2, metavar="N", help="more where steps are short (default: 2)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=BENCHMARKS / "results" / "telemetry.json",
        metavar="JSON",
        help="where the numbers go (default: benchmarks/results/telemetry.json)",
    )
    return Settings(**vars(parser.parse_args()))


def _rank_main(rank: int, settings: Settings, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with report_errors():
        _compare(settings, folder)


def _compare(settings: Settings, folder: Path) -> None:
    from sides import Side, trainer_step
    from turns import take_turns

    from merit_ds.telemetry.sampler import Telemetry
    from merit_ds.telemetry.values import VALUES
    from merit_ds.training import setup
    from merit_ds.training.trainer import Trainer
    from merit_ds.training.watch import Watch

    config = load_config(settings.recipe, overrides=[*settings.overrides, f"run.save={folder}", "run.load=null"])
    plan = make_plan(config)
    setup.start_distributed(plan)
    data = setup.open_data(plan)
    engine = setup.wrap(plan, setup.build(plan, data))
    trainer = Trainer(engine, plan, data, Watch(plan))
    record = partial(add_row, folder / "telemetry.jsonl")
    telemetry = Telemetry(engine, wanted=VALUES, interval=1, device=plan.device, record=record)

    def step(chosen: Telemetry | None) -> None:
        trainer.telemetry = chosen
        trainer_step(trainer)

    sides = {name: Side(partial(step, chosen), engine, 0) for name, chosen in (("with", telemetry), ("without", None))}
    seconds = take_turns(sides, blocks=settings.blocks, steps=settings.steps_per_block, device=plan.device)
    if plan.rank == 0:
        rows = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
        result = _result(seconds) | {"values": sorted(json.loads(rows[-1]))} | _circumstances(settings, plan)
        _show(result)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {os.path.relpath(settings.output)}")
    dist.barrier()
    dist.destroy_process_group()


def _result(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [sampled / plain for sampled, plain in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "sampled_step": {"median": median(ratios), "min": min(ratios), "max": max(ratios), "pairs": ratios},
        "interval": INTERVAL,
        "share_of_time": (median(ratios) - 1) / INTERVAL,
        "wanted": WANTED,
        "seconds": seconds,
    }


def _circumstances(settings: Settings, plan: Plan) -> dict[str, Any]:
    return {
        "recipe": os.path.relpath(settings.recipe, BENCHMARKS.parent),
        "overrides": settings.overrides,
        "accumulation": plan.batch.accumulation,
        "device": plan.device.type,
        "ranks": plan.world,
        "steps_per_block": settings.steps_per_block,
        **provenance(),
    }


def _show(result: dict[str, Any]) -> None:
    sampled = result["sampled_step"]
    print(
        f"\na sampled step / another: {sampled['median']:.3f} ({sampled['min']:.3f} to {sampled['max']:.3f})\n"
        f"of the time, at one sample in {result['interval']} steps: {100 * result['share_of_time']:.3f} %; "
        f"wanted: under {100 * WANTED:.0f} %"
    )


if __name__ == "__main__":
    main()
