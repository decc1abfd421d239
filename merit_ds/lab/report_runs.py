# SPDX-License-Identifier: Apache-2.0
"""Reads study folders: the finished runs with their settings, and what is known of how they were made.

Reading is lenient, since a report on half a study is worth having: what a run lacks is left out, and said.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from merit_ds.errors import InputError
from merit_ds.training.config import ModelConfig
from merit_ds.training.report import read_rows

_ABSOLUTE_PATH = re.compile(r"(?<![\w./-])/(?:[\w.+-]+/)+([\w.+-]+)")


@dataclass(frozen=True)
class Family:
    """Runs whose losses may be compared: one model, one corpus and one token budget."""

    model: str
    """As it is shown: the label in the study, and where another model or corpus has the same label, the study."""
    tokens: int | None
    settings: tuple[tuple[str, str], ...] = ()
    """What the model and its corpus are, whatever their label; empty where it is not known."""

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
    def model(self) -> str:
        """The model's label in the study."""
        return str((self.result.get("point") or {}).get("model", "default"))

    @property
    def setting(self) -> tuple[object, ...]:
        """What the seeds of one setting share."""
        return (self.family, self.optimizer, self.variant, self.batch, self.lr)

    @property
    def point(self) -> tuple[object, ...]:
        """What may be there only once."""
        return (*self.setting, self.seed)

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

    @property
    def models(self) -> list[str]:
        """The labels of its runs' models, in the order of study.yaml where that can be read."""
        with suppress(yaml.YAMLError):
            study = yaml.safe_load(self.text or "")
            listed = study.get("models") if isinstance(study, dict) else None
            return list(dict.fromkeys([*(str(label) for label in listed or ()), *(run.model for run in self.runs)]))
        return list(dict.fromkeys(run.model for run in self.runs))


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
    return Study(name, folder, None if text is None else shorten_paths(text), _settled(runs.values()), unfinished)


def _settled(runs: Iterable[Run]) -> list[Run]:
    """The runs, those whose folder is gone with the settings of another of the same study and label."""
    runs = list(runs)
    known = {run.family.model: run.family for run in runs if run.folder}
    families = [run.family if run.folder else known.get(run.family.model, run.family) for run in runs]
    return [
        replace(run, family=replace(run.family, settings=family.settings))
        for run, family in zip(runs, families, strict=True)
    ]


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the study's name in the model's where several models or corpora have one label."""
    first: dict[str, dict[tuple[tuple[str, str], ...], str]] = {}
    for run in runs:
        first.setdefault(run.family.model, {}).setdefault(run.family.settings, run.study)
    return [
        replace(run, family=replace(run.family, model=_shown(run.family.model, studies[run.family.settings])))
        if len(studies := first[run.family.model]) > 1
        else run
        for run in runs
    ]


def _shown(label: str, study: str) -> str:
    return study if label == "default" else f"{label} of {study}"


def differences(families: Iterable[Family]) -> str | None:
    """What tells the models and corpora apart, "small: hidden_size 64; large: hidden_size 256"; None: nothing.

    A setting that a model leaves at its default is left out.
    """
    models = {family.model: dict(family.settings) for family in families}
    keys = {key: None for settings in models.values() for key in settings}
    differing = [key for key in keys if len({settings.get(key) for settings in models.values()}) > 1]
    if not differing:
        return None
    texts = {
        name: [f"{key} {values[key][:12]}" for key in differing if key in values] for name, values in models.items()
    }
    return "; ".join(f"{name}: {', '.join(text) or 'defaults'}" for name, text in texts.items())


def distinct(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """The first run of each point, and the others, so that a point of two studies does not count twice."""
    first: dict[tuple[object, ...], Run] = {}
    others = [run for run in runs if first.setdefault(run.point, run) is not run]
    return list(first.values()), others


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


def _settings(result: dict[str, Any], folder: Path | None) -> tuple[tuple[str, str], ...]:
    """The model's settings, as far as they change its losses, and the corpus's hashes."""
    path = None if folder is None else folder / "recipe.yaml"
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"] if path and path.is_file() else {}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no recipe of a run ({error!r}); do the run again") from None
    with suppress(ValueError):  # of another version: its settings as they stand
        model = ModelConfig(**model).identity() if model else {}
    data = result.get("data") or {}
    hashes = {key: str(data[key]) for key in ("tokenizer", "train_sha256", "valid_sha256") if data.get(key)}
    return tuple((key, str(value)) for key, value in (model | hashes).items())


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
            family=Family(
                str(point.get("model", "default")), None if tokens is None else int(tokens), _settings(result, folder)
            ),
            status=str(result.get("status", "failed")),
            reason=None if result.get("reason") is None else shorten_paths(str(result["reason"])),
            result=result,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its point lacks or misspells {error}; do the run again") from None
