# SPDX-License-Identifier: Apache-2.0
"""Draw what a run's telemetry.jsonl holds.

    python -m merit_ds.telemetry runs/quickstart              # PNGs into runs/quickstart/telemetry
    python -m merit_ds.telemetry runs/*                       # each run's into its own folder

A PNG for each value that was sampled: by layer and step, or by kind of weight and step. README.md says what they are.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.telemetry.plots import save_plots
from merit_ds.training.cli import report_errors
from merit_ds.training.report import RunFolder, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.telemetry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run.save of pretrain_gpt.py")
    arguments = parser.parse_args()
    with report_errors():
        for run in tqdm(arguments.runs, unit="run", disable=len(arguments.runs) == 1):
            for path in draw(run):
                tqdm.write(str(path))


def draw(run: Path) -> list[Path]:
    """The PNGs of one run's folder.

    Raises:
        InputError: it holds no telemetry.
    """
    source = RunFolder(run).telemetry
    rows = read_rows(source)
    if not rows:
        raise InputError(f"{source}: no samples there; give a run.save, of a run with telemetry.interval above 0")
    return save_plots(rows, run / "telemetry", title=run.resolve().name)


if __name__ == "__main__":
    main()
