# SPDX-License-Identifier: Apache-2.0
"""The report's section on Hessians: what `python -m merit_ds.telemetry.hessian` wrote into the studies' folders."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from merit_ds.lab.figures import look, ordered
from merit_ds.lab.report_links import Links
from merit_ds.lab.report_page import Cell, Plot, Section, Table, cell
from merit_ds.lab.report_runs import Run, Study
from merit_ds.lab.study import slug
from merit_ds.telemetry.hessian import read_result
from merit_ds.telemetry.hessian_picture import spectra

Results = Sequence[tuple[Path, dict[str, Any]]]
"""Files with what is in them."""


def hessian_section(studies: Sequence[Study], links: Links) -> Section | None:
    """Top eigenvalue, trace and spectrum of the results in a study's folder `hessian`; None where there are none."""
    section = Section("Hessian at a checkpoint", "hessian")
    section.text.append(
        "How curved the validation loss is where an optimizer has come to: the Hessian's top eigenvalue, by Lanczos, "
        "and its trace, by Hutchinson's estimator with its standard error, on the same validation sequences for all "
        "runs of a table (`python -m merit_ds.telemetry.hessian`)."
    )
    for study in studies:
        for number, results in enumerate(_comparable(study)):
            name = f"hessian-{slug(study.name)}" + (f"-{number + 1}" if number else "")
            pictured = _one_seed_each(study, results)
            which = "" if len(pictured) == len(results) else " One seed of each, the first; the table has all."
            caption = (
                f"{study.name}: spectral density of the Hessian of the validation loss, on an axis that is linear near "
                "0 and logarithmic far from it. Beside the paper's figure 7."
            )
            section.parts.append(Plot(name, caption + which, partial(_draw, pictured)))
            section.parts.append(_table(study, results, links))
    return section if section.parts else None


def _comparable(study: Study) -> list[Results]:
    """The study's results, those on the same data together."""
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in sorted((study.folder / "hessian").glob("*.json")):
        result = read_result(path)
        found.setdefault(json.dumps(result["data"], sort_keys=True), []).append((path, result))
    return list(found.values())


def _one_seed_each(study: Study, results: Results) -> list[dict[str, Any]]:
    """The first result of each setting, as a picture of many spectra cannot be read."""
    runs = {run.folder.name: run for run in study.runs if run.folder}
    found: dict[object, tuple[int, dict[str, Any]]] = {}
    for _, result in results:
        folder, step = result["run"]["folder"], result["checkpoint"]["step"]
        run = runs.get(folder)
        setting, seed = ((run.setting, step), run.seed) if run else ((folder, step), 0)
        if setting not in found or seed < found[setting][0]:
            found[setting] = (seed, result)
    return [result for _, result in found.values()]


def _draw(results: Sequence[dict[str, Any]]) -> Any:
    colours = [look(result["run"]["optimizer"])[0] for result in results]
    return spectra(results, colours=colours if len(set(colours)) == len(colours) else None)


def _table(study: Study, results: Results, links: Links) -> Table:
    runs = {run.folder.name: run for run in study.runs if run.folder}
    names = ordered(result["run"]["optimizer"] for _, result in results)
    by_optimizer = sorted(results, key=lambda pair: names.index(pair[1]["run"]["optimizer"]))
    rows = [_row(path, result, runs.get(result["run"]["folder"]), links) for path, result in by_optimizer]
    columns = ["optimizer", "run", "step", "loss", "top eigenvalue", "trace", "parameters", "revision", "result"]
    data = results[0][1]["data"]
    title = f"{study.name}: the Hessian on {data['sequences']:,} validation sequences, {data['tokens']:,} tokens"
    return Table(title, columns, rows)


def _row(path: Path, result: dict[str, Any], run: Run | None, links: Links) -> list[Cell]:
    trace, made = result["trace"], result["run"]
    error = "" if trace["standard_error"] is None else f" ± {trace['standard_error']:,.3g}"
    name = run.name if run else made["optimizer"]
    return [
        cell(name, colour=look(name)[0]),
        cell(made["folder"], links.run(run) if run else None),
        cell(f"{result['checkpoint']['step']:,}"),
        cell(f"{result['loss']:.3f}"),
        cell(f"{result['top_eigenvalues'][0]['value']:,.4g}"),
        cell(f"{trace['mean']:,.4g}{error}"),
        cell(f"{result['parameters']:,}"),
        cell(made.get("git") or "not recorded"),
        cell(path.name, links.file(path)),
    ]
