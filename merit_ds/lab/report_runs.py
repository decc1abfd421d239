# SPDX-License-Identifier: Apache-2.0
"""Reads study folders: the finished runs with their settings, and what is known of how they were made.

Reading is lenient, since a report on half a study is worth having: what a run lacks is left out, and said.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merit_ds.errors import InputError

_ABSOLUTE_PATH = re.compile(r"(?<![\w./-])/(?:[\w.+-]+/)+([\w.+-]+)")


@dataclass(frozen=True)
class Family:
    """Runs whose losses may be compared: one model and one token budget."""

    model: str
    tokens: int | None

    @property
    def title(self) -> str:
        budget = "" if self.tokens is None else f"{count_text(self.tokens)} tokens"
        return ", ".join(part for part in (self.model if self.model != "default" else "", budget) if part) or "default"


@dataclass(frozen=True)
class Run:
    """One run of a study, finished in whatever way."""

    id: str
    study: str
    folder: Path | None
    """None where only the study's results.jsonl tells of it."""
    optimizer: str
    """Label in the study; for an ablation that of the full optimizer."""
    variant: str | None
    """Label of the ablation; None for the full optimizer."""
    lr: float
    batch: int
    """Sequences an optimizer step."""
    seed: int
    family: Family
    status: str
    """done, diverged or failed."""
    reason: str | None
    result: dict[str, Any] = field(hash=False, compare=False)
    """result.json, for the listing."""

    @property
    def name(self) -> str:
        return self.optimizer if self.variant is None else self.variant

    @property
    def point(self) -> tuple[object, ...]:
        """What may be there only once."""
        return (self.family, self.optimizer, self.variant, self.batch, self.lr, self.seed)

    @property
    def loss(self) -> float | None:
        """Final validation loss in nats a token; infinity if it diverged, None if the run gave no result."""
        value = number(self.result.get("final_valid_loss"))
        if self.status == "diverged" or (self.status == "done" and value is not None and not math.isfinite(value)):
            return math.inf
        return value if self.status == "done" else None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [] if self.folder is None else read_rows(self.folder / "metrics.jsonl")

    @cached_property
    def telemetry(self) -> list[dict[str, Any]]:
        return [] if self.folder is None else read_rows(self.folder / "telemetry.jsonl")

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(optimizer steps, value) of the metrics that have `key`."""
        pairs = ((row["iteration"], number(row[key])) for row in self.metrics if key in row)
        return [(step, math.nan if value is None else value) for step, value in pairs]

    def text(self, name: str) -> str | None:
        """A file of the run's folder with absolute paths cut to their last part; None if it is not there."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return shorten_paths((self.folder / name).read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class Study:
    """A study folder: its runs, and what it says about itself."""

    name: str
    folder: Path
    text: str | None
    """study.yaml."""
    runs: list[Run]
    unfinished: list[str]
    """Names of run folders without a result."""


def read_study(folder: Path) -> Study:
    """Read a study folder: `runs/*/result.json`, and of `results.jsonl` what these do not tell.

    Raises:
        InputError: it is no study folder, or a result cannot be read.
    """
    if not (folder / "runs").is_dir() and not (folder / "results.jsonl").is_file():
        raise InputError(f"{folder}: neither runs/ nor results.jsonl is in it; give the folder that `lab run` wrote")
    path = folder / "study.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    name = folder.resolve().name
    runs: dict[str, Run] = {}
    unfinished = []
    for run_folder in sorted((folder / "runs").glob("*/")):
        result_path = run_folder / "result.json"
        if not result_path.is_file():
            unfinished.append(run_folder.name)
            continue
        result = _read_result(result_path)
        runs[str(result.get("id", run_folder.name))] = _run(result, run_folder, name, where=result_path)
    for row in read_rows(folder / "results.jsonl"):
        if str(row.get("id")) not in runs:
            runs[str(row.get("id"))] = _run(row, None, name, where=folder / "results.jsonl")
    unfinished = [name for name in unfinished if name not in runs]
    return Study(name, folder, None if text is None else shorten_paths(text), list(runs.values()), unfinished)


def distinct(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """The first run of each point, and the others, so that a point of two studies does not count twice."""
    first: dict[tuple[object, ...], Run] = {}
    others = [run for run in runs if first.setdefault(run.point, run) is not run]
    return list(first.values()), others


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, none if it is not there; a last line that a kill cut short is left out.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise InputError(f"{path}: a line is not JSON ({error}); remove it, or do the run again") from None


def number(value: object) -> float | None:
    """A JSON value as a float, also from "nan" or "inf"; None if it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def count_text(count: float) -> str:
    """2_000_000_000 as "2 B", 5_242_880 as "5.24 M"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:g}"


def shorten_paths(text: str) -> str:
    """Cut absolute paths to their last part: they name a machine's folders and help no reader."""
    return _ABSOLUTE_PATH.sub(r"…/\1", text)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove it and do the run again") from None
    if not isinstance(result, dict):
        raise InputError(f"{path}: not a JSON object; remove it and do the run again")
    return result


def _run(result: dict[str, Any], folder: Path | None, study: str, *, where: Path) -> Run:
    point = result.get("point") or {}
    try:
        variant = point.get("ablation")
        tokens = number(point.get("tokens"))
        return Run(
            id=str(result.get("id", folder.name if folder else "?")),
            study=study,
            folder=folder,
            optimizer=str(point["optimizer"]),
            variant=None if variant is None else str(variant),
            lr=float(point["lr"]),
            batch=int(point["batch"]),
            seed=int(point.get("seed", 0)),
            family=Family(str(point.get("model", "default")), None if tokens is None else int(tokens)),
            status=str(result.get("status", "failed")),
            reason=None if result.get("reason") is None else shorten_paths(str(result["reason"])),
            result=result,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its point lacks or misspells {error}; do the run again") from None
