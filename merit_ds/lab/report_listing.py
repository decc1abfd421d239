# SPDX-License-Identifier: Apache-2.0
"""The report's overview, and its list of all runs: how each was made and where it lies."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merit_ds.lab.figures import look
from merit_ds.lab.report_cost import run_seconds, run_tflops
from merit_ds.lab.report_links import Links, anchor
from merit_ds.lab.report_loss import Tuned, by_family
from merit_ds.lab.report_page import Cell, Details, Section, Table, cell
from merit_ds.lab.report_runs import Run, Study, count_text, differences, number, shorten_paths
from merit_ds.lab.report_statistics import Best, overlaps, winner


def overview_section(
    studies: Sequence[Study], runs: Sequence[Run], doubles: Sequence[Run], tuned: Sequence[Tuned], links: Links
) -> Section:
    """What was run, who is ahead, and what went wrong."""
    section = Section("In short", "overview")
    counts = Counter(run.status for run in runs)
    unfinished = [name for study in studies for name in study.unfinished]
    section.text.append(
        f"{len(runs)} runs: {counts['done']} finished, {counts['diverged']} diverged, {counts['failed']} failed"
        + (f"; without a result yet: {len(unfinished)}." if unfinished else ".")
    )
    if models := differences(run.family for run in runs):
        section.text.append(f"Models and corpora: {models}.")
    for family, batches in by_family(tuned).items():
        if leaders := _leaders(batches):
            section.text.append(f"{family.title}: {'; '.join(leaders)}.")
    if not any(one.best for one in tuned):
        section.warnings.append("No run finished with a validation loss, so there is nothing to compare.")
    if doubles:
        section.warnings.append(
            "Not counted, since they repeat a point of an earlier study: "
            + ", ".join(f"{run.study}/{run.id}" for run in doubles)
            + "."
        )
    section.warnings += _mixtures(runs)
    bad = [run for run in runs if run.loss is None or math.isinf(run.loss)]
    if bad:
        columns = ["run", "optimizer", "batch", "lr", "seed", "outcome", "reason"]
        note = "A diverged run counts as an infinite loss. A failed one counts as not run."
        section.parts.append(Table("Diverged and failed runs", columns, [_bad_row(run, links) for run in bad], note))
    return section


def _leaders(batches: dict[int, dict[str, Tuned]]) -> list[str]:
    grids = {batch: {name: one.best for name, one in group.items() if one.best} for batch, group in batches.items()}
    return [f"at batch {batch:,} {line}" for batch, found in grids.items() if (line := leader_text(found))]


def leader_text(found: Mapping[str, Best]) -> str | None:
    """Who has the lowest loss, by how much, and what speaks against it; None where there is nothing to compare.

    Only optimizers that no seed lost are compared: the mean of the seeds that are left says nothing of the others.
    """
    summaries = {name: best.summary for name, best in found.items() if not best.summary.diverged}
    leader = winner(summaries)
    if leader is None or len(found) < 2:
        return None
    lost = [
        f"{name} lost {b.summary.diverged} of {len(b.losses)} seeds" for name, b in found.items() if b.summary.diverged
    ]
    not_compared = f" (not compared: {', '.join(lost)})" if lost else ""
    others = {name: summary for name, summary in summaries.items() if name != leader}
    second = winner(others)
    if second is None:
        return f"{leader} alone lost no seed, {summaries[leader].mean:.3f}{not_compared}"
    doubts = [
        f"{name}'s best learning rate is the {edge} one tried"
        for name in (leader, second)
        if (edge := found[name].edge)
    ]
    if overlaps(summaries[leader], summaries[second]):
        doubts.insert(0, "ranges over seeds overlap")
    elif min(summaries[leader].finite, summaries[second].finite) == 1:
        doubts.insert(0, "not both with several seeds")
    lower = [name for name, summary in summaries.items() if summary.mean < summaries[leader].mean]
    if lower:
        doubts.append(f"lower with one seed: {', '.join(lower)}")
    fresh = {name: best.fresh for name, best in found.items() if name in summaries and best.fresh}
    if len(fresh) == len(summaries) and (ahead := winner(fresh)) != leader:
        doubts.append(f"on the fresh seeds {ahead} is ahead")
    gap = summaries[second].mean - summaries[leader].mean
    doubt = f" ({'; '.join(doubts)})" if doubts else ""
    return f"{leader} has the lowest loss, {summaries[leader].mean:.3f}, {gap:.3f} below {second}{doubt}{not_compared}"


def _mixtures(runs: Sequence[Run]) -> list[str]:
    """Differences between runs that a reader should know of before comparing them."""
    found = []
    for key, name in (("git", "git revisions"), ("device", "devices")):
        found += _mixture(name, [run.result.get(key) for run in runs])
    for package in ("torch", "deepspeed"):
        versions = [run.result.get("versions") for run in runs]
        found += _mixture(f"versions of {package}", [v.get(package) for v in versions if isinstance(v, dict)])
    corpora = {json.dumps(run.result["data"], sort_keys=True) for run in runs if run.result.get("data")}
    if len(corpora) > 1:
        found.append(f"The runs come from {len(corpora)} different corpora: their losses cannot be compared.")
    return found


def _mixture(name: str, values: Sequence[object]) -> list[str]:
    distinct = sorted({str(value) for value in values if value})
    return [f"The runs come from {len(distinct)} {name}: {', '.join(distinct)}."] if len(distinct) > 1 else []


def _bad_row(run: Run, links: Links) -> list[Cell]:
    outcome = run.status if run.status != "done" else "no validation loss" if run.loss is None else "loss not finite"
    return [
        cell(run.id, links.run(run)),
        cell(run.name, colour=look(run.optimizer)[0]),
        cell(f"{run.batch:,}"),
        cell(f"{run.lr:g}"),
        cell(run.seed),
        cell(outcome),
        cell(run.reason or ""),
    ]


def runs_section(runs: Sequence[Run], links: Links) -> Section:
    """Every run: settings, provenance, and its files."""
    section = Section("All runs", "runs")
    section.text.append("Open a run for how it was made. Absolute paths are cut to their last part.")
    section.details = [_details(run, links) for run in runs]
    return section


def studies_section(studies: Sequence[Study]) -> Section:
    """The study files."""
    section = Section("Studies", "studies")
    for study in studies:
        files = [("study.yaml", study.text)] if study.text else []
        summary = cell(f"{study.name}: {len(study.runs)} runs")
        section.details.append(Details(f"study-{study.name}", summary, files=files))
    return section


def _details(run: Run, links: Links) -> Details:
    loss = "no loss" if run.loss is None else "diverged" if math.isinf(run.loss) else f"loss {run.loss:.4f}"
    text = f"{run.name}, {run.family.title}, batch {run.batch:,}, lr {run.lr:g}, seed {run.seed}: {run.status}, {loss}"
    files = [(name, run.text(name)) for name in ("recipe.yaml", "deepspeed.json", "run.json")]
    return Details(
        anchor(run),
        cell(text, colour=look(run.optimizer)[0]),
        facts=_facts(run, links),
        files=[(name, content) for name, content in files if content is not None],
    )


def _facts(run: Run, links: Links) -> list[tuple[str, Cell]]:
    result = run.result
    tokens = run.family.tokens
    facts: list[tuple[str, Any]] = [
        ("reason", run.reason),
        ("ablation of", run.optimizer if run.variant else None),
        ("steps", result.get("steps")),
        ("tokens", None if tokens is None else f"{tokens:,} ({count_text(tokens)})"),
        ("seed", run.seed),
        ("final validation loss", _number_text(result.get("final_valid_loss"))),
        ("lowest validation loss", _number_text(result.get("best_valid_loss"))),
        ("seconds a step", _number_text(run_seconds(run))),
        ("TFLOP/s a rank", _number_text(run_tflops(run))),
        ("wall time", _duration(number(result.get("wall_seconds")))),
        ("git revision", result.get("git")),
        ("versions", _versions(result.get("versions"))),
        ("device", result.get("device")),
        ("finished", result.get("time")),
    ]
    folder = cell(f"{run.study}/runs/{run.id}", links.run(run)) if run.folder else cell("not kept")
    shown = [(name, cell(shorten_paths(str(value)))) for name, value in facts if value not in (None, "")]
    return [("folder", folder), *shown]


def _number_text(value: object) -> str | None:
    converted = number(value)
    return None if converted is None else f"{converted:.4g}" if math.isfinite(converted) else "not finite"


def _duration(seconds: float | None) -> str | None:
    if seconds is None or not math.isfinite(seconds):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _versions(versions: object) -> str | None:
    if isinstance(versions, dict):
        return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return None if versions is None else json.dumps(versions)
