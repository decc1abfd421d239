# SPDX-License-Identifier: Apache-2.0
"""Plan before you pay: what a recipe needs of GPUs, without one.

    python -m merit_ds.plan configs/gpt2_large_8k.yaml --nodes 8 --gpus-per-node 8 --gpu h100-80g
    python -m merit_ds.plan configs/gpt2_large_8k.yaml --nodes 8 --plot plan.png --json plan.json

It prints the memory of a GPU by part for each ZeRO stage, the largest micro-batch that fits, the bytes that a rank
sends in a step and by which collectives, and an estimated step time with all that it assumes. What the trainer would
refuse on these GPUs is refused here, in the same words. The model is built and run on torch's "meta" device, where
tensors have sizes and no memory: it takes seconds.

Bytes of parameters, gradients, optimizer state and traffic are held against real DeepSpeed engines by the tests; times
are estimates. docs/plan.md explains every line.
"""

import argparse
import json
import os
import sys
import warnings
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError
from merit_ds.plan.gpus import GPUS
from merit_ds.plan.wrapper import wrapper_of
from merit_ds.training.cli import report_errors
from merit_ds.training.config import load_config
from merit_ds.training.deepspeed_config import read_deepspeed_json
from merit_ds.training.plan import plan_of


def main() -> None:
    arguments = _parser().parse_args()
    with report_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' advice on versions
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Raises: InputError: the recipe, or the recipe on these GPUs, is not valid."""
    _check_place("--json", arguments.json)
    _check_place("--plot", arguments.plot)
    config = load_config(arguments.recipe, overrides=arguments.set)
    ds_config = read_deepspeed_json(Path(config.run.deepspeed))
    plan_of(config, ds_config, world=arguments.nodes * arguments.gpus_per_node)
    wrapper_of(ds_config)
    # Megatron-core takes seconds to import: what can be refused without it has been refused.
    from merit_ds.plan import report
    from merit_ds.plan.curve import curve, draw
    from merit_ds.plan.forecast import forecast, on_paper
    from merit_ds.plan.timing import Assumptions, Cluster

    gpu = GPUS[arguments.gpu]
    network = gpu.network if arguments.network is None else arguments.network * 1e9
    cluster = Cluster(gpu, arguments.nodes, arguments.gpus_per_node, network)
    assumed = replace(Assumptions(), compute=arguments.efficiency)
    with on_paper(config, ds_config) as paper:
        found = forecast(paper, ds_config, cluster, assumed)
        points = curve(paper, ds_config, cluster, assumed) if arguments.plot or arguments.json else []
    if arguments.json:
        _write_json(arguments.json, report.values(found, points, gpu_name=arguments.gpu))
    if str(arguments.json) != "-":
        print(report.text(found, gpu_name=arguments.gpu))
    if arguments.plot:  # last, so that it takes nothing with it if it fails
        draw(points, found, arguments.plot, title=f"{arguments.recipe.stem} on {arguments.gpu}")
        if str(arguments.json) != "-":
            print(f"\ncurve     {arguments.plot}")


def _check_place(option: str, path: Path | None) -> None:
    """Before the work: that a file can be written there."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise InputError(f"{option} {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: it may not be written")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    content = json.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(content)
        return
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path}: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="the trainer's YAML; see configs/")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="G", help="GPUs, and ranks, of each (default: 8)"
    )
    parser.add_argument(
        "--gpu", choices=list(GPUS), default="h100-80g", help="which; merit_ds/plan/gpus.py has their data sheets"
    )
    parser.add_argument(
        "--network",
        type=_rate,
        metavar="GB/S",
        help="of a GPU's way out of its node, one way (default: the network card of NVIDIA's own server: 50 GB/s for "
        "the H100, which is 400 Gb/s)",
    )
    parser.add_argument(
        "--efficiency",
        type=_share,
        default=0.40,
        metavar="SHARE",
        help="of the data sheet's FLOP/s that forward and backward passes reach, assumed (default: 0.40); the printed "
        "MFU, of the whole step, follows from it",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change any value of the recipe, as for the trainer, for instance --set model.tensor_parallel=2; may be "
        "repeated",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw the estimated step time from one node to 4,096 GPUs, and where the batch stops scaling",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, in bytes and seconds; - for stdout")
    return parser


def _positive(given: str) -> int:
    if not (given.isdecimal() and int(given)):
        raise argparse.ArgumentTypeError(f"{given} is no positive integer")
    return int(given)


def _rate(given: str) -> float:
    return _number(given, most=inf)


def _share(given: str) -> float:
    return _number(given, most=1)


def _number(given: str, *, most: float) -> float:
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value <= most or value == inf:
        raise argparse.ArgumentTypeError(f"{given} is no number above 0" + ("" if most == inf else f" up to {most:g}"))
    return value


if __name__ == "__main__":
    main()
