# SPDX-License-Identifier: Apache-2.0
"""Writes the report on one study or several: `report.html`, which holds everything, its pictures as PNGs, `report.md`.

python -m merit_ds.lab report STUDY_OUT [STUDY_OUT2 ...] [--output DIR] [--target-loss LOSS]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from merit_ds.errors import InputError
from merit_ds.lab.figures import styled, to_png
from merit_ds.lab.report_ablations import ablations_section
from merit_ds.lab.report_cost import cost_section
from merit_ds.lab.report_curves import curves_section
from merit_ds.lab.report_hessian import hessian_section
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_listing import overview_section, runs_section, studies_section
from merit_ds.lab.report_loss import best_section, sensitivity_section, tune
from merit_ds.lab.report_models import models_section
from merit_ds.lab.report_page import Plot, Section, render_html, render_markdown
from merit_ds.lab.report_repeats import repeats_section
from merit_ds.lab.report_runs import Study, distinct, read_study, tell_apart
from merit_ds.lab.report_settings import tell_settings_apart
from merit_ds.lab.report_steps import steps_section
from merit_ds.lab.report_telemetry import telemetry_sections
from merit_ds.training.cli import report_errors
from merit_ds.training.manifest import write_text


def write_report(folders: Sequence[Path], *, output: Path, target_loss: float | None = None) -> list[Path]:
    """Read the study folders and write the report into `output`.

    Args:
        folders: as `lab run` wrote them; a point that several hold counts once, from the first.
        output: is created; files of the same names are replaced.
        target_loss: of "steps to a given loss", nats a token; None: for each batch but the smallest the worst final
            loss of its best runs.

    Returns:
        The files, the page first.

    Raises:
        InputError: a folder is no study, holds no finished run, or cannot be read.
    """
    studies = [read_study(folder) for folder in folders]
    if not any(study.runs for study in studies):
        raise InputError(f"{', '.join(map(str, folders))}: no run has a result yet; wait for `lab run` to finish one")
    sections = build_sections(studies, Links(output), target_loss=target_loss)
    output.mkdir(parents=True, exist_ok=True)
    plots = [part for section in sections for part in section.parts if isinstance(part, Plot)]
    with styled():
        images = {plot.name: to_png(plot.draw()) for plot in tqdm(plots, desc="drawing", unit="picture", leave=False)}
    for name, png in images.items():
        (output / f"{name}.png").write_bytes(png)
    title = "Large-batch laboratory: " + ", ".join(dict.fromkeys(study.name for study in studies))
    page, text = output / "report.html", output / "report.md"
    write_text(page, render_html(sections, title=title, lead=_LEAD, images=images))
    write_text(text, render_markdown(sections, title=title, lead=_LEAD))
    return [page, text, *(output / f"{name}.png" for name in images)]


_LEAD = (
    "Optimizers compared at their own best learning rates, on the same model, data and token budget. “The paper” is "
    "MERIT's, arXiv 2508.20577."
)


def build_sections(studies: Sequence[Study], links: Links, *, target_loss: float | None) -> list[Section]:
    """The report's parts, each only where its data is there."""
    every = tell_settings_apart(tell_apart([run for study in studies for run in study.runs]))
    runs, doubles = distinct(every)
    tuned = tune(runs)
    found = [
        overview_section(studies, runs, doubles, tuned, links),
        best_section(tuned, links),
        sensitivity_section(tuned, links),
        steps_section(tuned, links, target=target_loss),
        curves_section(tuned, links),
        repeats_section(every, links),
        ablations_section(runs, tuned, links),
        models_section(studies, tuned, links),
        *telemetry_sections(tuned, links),
        hessian_section(studies, links),
        cost_section(runs, links),
        studies_section(studies),
        runs_section(runs, links),
    ]
    return [section for section in found if section is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; without `arguments` that of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m merit_ds.lab report",
        description="Write report.html (one file, works offline), its pictures as PNGs, and report.md.",
        epilog="Example: python -m merit_ds.lab report studies/coarse studies/seeds --output studies/report",
    )
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY_OUT", help="folders that `lab run` wrote")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to (default: report/ in the first folder)")
    parser.add_argument(
        "--target-loss",
        type=float,
        metavar="LOSS",
        help="validation loss of “steps to a given loss”, nats a token (default: for each batch but the "
        "smallest the worst final one of its best runs)",
    )
    parsed = parser.parse_args(arguments)
    with report_errors():
        written = write_report(
            parsed.studies, output=parsed.output or parsed.studies[0] / "report", target_loss=parsed.target_loss
        )
        print(f"{written[0]}: the report; beside it report.md and {len(written) - 2} pictures")


if __name__ == "__main__":
    main()
