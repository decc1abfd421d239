# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a run's validation loss at a checkpoint: top eigenvalues, trace and spectral density.

    python -m merit_ds.telemetry.hessian runs/gpt2
    python -m merit_ds.telemetry.hessian runs/adamw runs/merit --output runs/hessian

How curved the loss is where an optimizer has ended (figure 7 of the MERIT paper). Of each run it takes the newest
complete checkpoint, computes products of the Hessian with vectors, exactly and in float32, by differentiating the mean
loss of some validation sequences twice, and from these
- the top eigenvalues, by Lanczos with full re-orthogonalisation, each with the distance within which one must lie;
- the trace, by Hutchinson's estimator with vectors of signs, and its standard error;
- the spectral density, by stochastic Lanczos quadrature.
They go into a JSON file, and into a picture. Several runs are measured on the same sequences with the same vectors, and
drawn into one picture. In place of a run, the JSON file of an earlier call may be named.

Time: a product takes three to four times as long as the gradient of these sequences. There are probes x lanczos
products, and those that the trace takes beyond: 49 by default, for a model of 0.85 M parameters and sequences of 256
tokens on one CPU core about a minute with --sequences 16, four to five with the default 64. Memory: one micro-batch,
and `lanczos` vectors of the model's size. One process, on a GPU where there is one.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_ds.errors import InputError
from merit_ds.training.cli import report_errors
from merit_ds.training.manifest import write_text

if TYPE_CHECKING:
    from merit_ds.telemetry.hessian_measure import Measurement

PICTURE = "hessian.png"
FORMAT = "merit_ds hessian 1"
"""Marks a result's JSON."""


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    with report_errors():
        measure_all(arguments)


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure each run, or read its result; write the results and the picture, and say where they lie.

    Raises:
        InputError: a run or a result cannot be read, two would be written to one file, or they cannot be compared. A
            damaged weight or a loss that is not finite is found when its run's turn comes; what was measured is kept.
    """
    if len(arguments.runs) > 1 and arguments.output is None:
        raise InputError("several runs make one picture: name a folder for it and their results by --output DIR")
    sources = [read_result(path) if path.is_file() else _open(path, arguments) for path in arguments.runs]
    targets = [_target(path, source, arguments) for path, source in zip(arguments.runs, sources, strict=True)]
    for target in targets:
        if targets.count(target) > 1:
            raise InputError(f"two results would both be {target}: name each run once, in folders of different names")
    _check_comparable([source["data"] if isinstance(source, dict) else source.data for source in sources])
    results = []
    for source, target in zip(sources, targets, strict=True):
        if not isinstance(source, dict):
            source = {"format": FORMAT} | source.measure()
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, json.dumps(source) + "\n")
            print(f"{_summary(source)}\nresult           {target}", flush=True)
        results.append(source)
    picture = targets[0].with_suffix(".png") if len(results) == 1 else Path(arguments.output) / PICTURE
    from merit_ds.telemetry.hessian_picture import draw_spectra

    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_spectra(results, picture)
    print(f"picture          {picture}", flush=True)


def _check_comparable(data: list[dict[str, Any]]) -> None:
    for key in data[0]:
        values = [entry[key] for entry in data]
        if any(value != values[0] for value in values):
            other = next(value for value in values if value != values[0])
            raise InputError(f"the runs cannot be compared: the validation data's {key} is {values[0]} and {other}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.telemetry.hessian",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (run.save), or a result's JSON"
    )
    parser.add_argument("--step", type=int, metavar="S", help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--data", metavar="PREFIX", help="prepared data (default: the recipe's data.prefix)")
    parser.add_argument(
        "--sequences", type=_positive, default=64, metavar="N", help="validation sequences in the loss (default: 64)"
    )
    parser.add_argument(
        "--micro-batch",
        type=_positive,
        default=4,
        metavar="N",
        help="sequences differentiated at a time, for memory alone (default: 4)",
    )
    parser.add_argument(
        "--lanczos",
        type=_positive,
        default=40,
        metavar="K",
        help="steps from each start vector: more resolve the density better (default: 40)",
    )
    parser.add_argument(
        "--probes", type=_positive, default=1, metavar="P", help="start vectors: more smooth the density (default: 1)"
    )
    parser.add_argument(
        "--trace-probes",
        type=_positive,
        default=10,
        metavar="P",
        help="vectors for the trace; the start vectors are the first of them, at no cost (default: 10)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="of the sequences' order and the vectors, for all runs (default: 1234)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: the run's folder; required for several)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _open(folder: Path, arguments: argparse.Namespace) -> "Measurement":
    # Megatron-core takes many seconds to import: not for --help, nor to draw results that are there.
    import torch

    from merit_ds.telemetry.hessian_measure import Measurement, Settings
    from merit_ds.training.checkpoint_weights import open_run

    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=arguments.device or default).device
    except (RuntimeError, AssertionError) as error:  # torch's own, where it is built without CUDA
        raise InputError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from None
    return Measurement(
        run=open_run(folder, step=arguments.step, data=arguments.data),
        settings=Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__}),
        device=device,
    )


def _target(path: Path, source: "dict[str, Any] | Measurement", arguments: argparse.Namespace) -> Path:
    """Where the result is, or will be."""
    if isinstance(source, dict):
        return path
    step = f"step{source.run.checkpoint.manifest.step}"
    if arguments.output is None:
        return path / f"hessian_{step}.json"
    return Path(arguments.output) / f"{path.resolve().name}_{step}.json"


def read_result(path: Path) -> dict[str, Any]:
    """An earlier call's result.

    Raises:
        InputError: the file cannot be read, or is none of this format.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] == FORMAT:
            return dict(result)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    command = "python -m merit_ds.telemetry.hessian"
    raise InputError(f"{path}: not a result of `{command}`, of the format {FORMAT} that this version reads")


def _summary(result: dict[str, Any]) -> str:
    top, trace = result["top_eigenvalues"], result["trace"]
    values = ", ".join(f"{pair['value']:.5g}" for pair in top)
    error = "" if trace["standard_error"] is None else f" (standard error {trace['standard_error']:.3g})"
    return (
        f"{result['label']}: loss {result['loss']:.4f}, {result['parameters']:,} parameters\n"
        f"top eigenvalues  {values} (the first within {top[0]['residual']:.2g})\n"
        f"lowest           {result['lowest_eigenvalue']['value']:.5g}\n"
        f"trace            {trace['mean']:.5g}{error}"
    )


if __name__ == "__main__":
    main()
