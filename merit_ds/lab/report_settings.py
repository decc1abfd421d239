# SPDX-License-Identifier: Apache-2.0
"""Tells optimizers of one name apart that were set otherwise, in two studies or before and after a study was changed.

Without it the report would take their losses for seeds of one optimizer, or for repeats that differ by rounding alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from merit_ds.errors import InputError
from merit_ds.lab.report_runs import Run


def tell_settings_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; where those of one name and batch were set otherwise, their names say how: "LARS (weight_decay 0.1)".

    A run without its files keeps its name.

    Raises:
        InputError: a run's deepspeed.json or recipe.yaml is not what the laboratory wrote.
    """
    settings = [training_settings(run.folder) if run.folder else {} for run in runs]
    groups: dict[tuple[object, ...], dict[int, list[Mapping[str, str]]]] = {}
    for run, found in zip(runs, settings, strict=True):
        if found:
            groups.setdefault(_label(run), {}).setdefault(run.batch, []).append(found)
    differing = {label: _differing(by_batch) for label, by_batch in groups.items()}
    return [_renamed(run, found, differing.get(_label(run), [])) for run, found in zip(runs, settings, strict=True)]


def training_settings(folder: Path) -> dict[str, str]:
    """What decides a run's loss besides model, corpus, budget, batch, rate and seed; nothing where its files are gone.

    Raises:
        InputError: its deepspeed.json or recipe.yaml is not what the laboratory wrote.
    """
    if not (folder / "deepspeed.json").is_file() or not (folder / "recipe.yaml").is_file():
        return {}
    try:
        deepspeed = json.loads((folder / "deepspeed.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        found = {key: deepspeed[key] for key in ("gradient_clipping",) if key in deepspeed}
        found |= {part: deepspeed.get(part, {}).get("enabled", False) for part in ("bf16", "fp16")}
        found |= {"eval_sequences": (recipe.get("run") or {}).get("eval_sequences")}
        for part in ("optimizer", "scheduler"):
            content = deepspeed.get(part, {})
            found |= {f"{part}.type": content.get("type")}
            found |= {f"{part}.{key}": value for key, value in content.get("params", {}).items() if key[-2:] != "lr"}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: cannot read how it was trained ({error!r}); do the run again") from None
    return {key: str(value) for key, value in found.items()}


def _label(run: Run) -> tuple[object, ...]:
    """What runs are compared under: of known models and corpora whatever these are called."""
    return (run.family.settings or run.family.model, run.family.tokens, run.optimizer, run.variant)


def _differing(by_batch: Mapping[int, Sequence[Mapping[str, str]]]) -> list[str]:
    """The keys whose values differ at one batch; from batch to batch a schedule's steps do anyway."""
    keys = {key: None for group in by_batch.values() for settings in group for key in settings}
    return [key for key in keys if any(len({one.get(key) for one in group}) > 1 for group in by_batch.values())]


def _renamed(run: Run, settings: Mapping[str, str], keys: Sequence[str]) -> Run:
    if not settings or not keys:
        return run
    values = ", ".join(f"{key.split('.')[-1]} {settings.get(key, 'not set')}" for key in keys)
    if run.variant is None:
        return replace(run, optimizer=f"{run.optimizer} ({values})")
    return replace(run, variant=f"{run.variant} ({values})")
