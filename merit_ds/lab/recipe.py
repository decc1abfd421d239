# SPDX-License-Identifier: Apache-2.0
"""A point of a study as the trainer's recipe and DeepSpeed JSON.

Everything in them is relative to the run's folder, which is the trainer's working directory, so that a study folder can
be moved, committed and compared. The corpus is a link that the lab makes beside `runs`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merit_ds.errors import InputError
from merit_ds.lab.attempts import ranks_before
from merit_ds.lab.points import Point
from merit_ds.lab.study import Study
from merit_ds.training.config import load_config
from merit_ds.training.deepspeed_config import MONITORS, check_deepspeed, read_deepspeed_json
from merit_ds.training.manifest import write_text
from merit_ds.training.schedule import check_scheduler, plan_batch, total_steps

RECIPE, DEEPSPEED, RESULT = "recipe.yaml", "deepspeed.json", "result.json"
CORPUS = "../../corpus"
"""data.prefix, seen from a run's folder."""
VOCAB = "../../corpus_vocab"
"""data.vocab, if the lab was given one."""
SCHEDULE = {"type": "WarmupCosineLR", "params": {"warmup_type": "linear", "cos_min_ratio": 0.1}}
"""Where the recipe's JSON has none."""
OWNED = ("run.deepspeed", "run.train_tokens", "run.seed", "run.save", "run.load", "data.prefix", "data.vocab")
"""What the lab sets itself."""


@dataclass(frozen=True)
class RunPlan:
    """A point with what follows from it.

    Attributes:
        steps: optimizer steps that the budget pays for.
        ranks: of the run.
        recipe: for `recipe.yaml`; only values that differ from the trainer's defaults or were given.
        deepspeed: for `deepspeed.json`.
    """

    point: Point
    steps: int
    ranks: int
    recipe: dict[str, Any]
    deepspeed: dict[str, Any]


def plan_run(study: Study, point: Point, *, folder: Path, ranks: int, vocab: bool) -> RunPlan:
    """Work out a run's files. Writes nothing.

    Args:
        folder: the study's, which `base` is relative to.
        ranks: of the run.
        vocab: whether the recipe names the vocabulary's link.

    Raises:
        InputError: the recipe, a change to it, or the JSON is not valid, or budget, batch and ranks do not fit.
    """
    model = study.models[point.cell.model]
    base = folder / (model.base or study.base)
    changes = study.set | model.set
    if owned := [key for key in OWNED if key in changes]:
        raise InputError(f"set: {owned[0]} is the lab's to set; leave it out")
    try:
        config = load_config(base, overrides=_overrides(changes))
        cell = point.cell
        steps = total_steps(cell.tokens, batch=cell.batch, seq_length=config.model.seq_length)
        every = {
            "run.eval_interval": max(1, steps // study.evaluations),
            "run.save_interval": max(1, steps // study.checkpoints),
            "run.log_interval": max(1, steps // 200),
            "run.keep_checkpoints": 1,
            "run.sample_tokens": 0,
        }
        if study.telemetry_samples:
            every["telemetry.interval"] = max(1, steps // study.telemetry_samples)
        config = load_config(base, overrides=_overrides(every | changes))
        data_ranks = ranks // config.model.tensor_parallel
        deepspeed = _deepspeed(study, point, read_deepspeed_json(Path(config.run.deepspeed)), steps, ranks=data_ranks)
        check_deepspeed(deepspeed)
        plan_batch(deepspeed, ranks=data_ranks)
        check_scheduler(deepspeed, steps=steps)
    except InputError as error:
        raise InputError(f"run {point.id}: {error}") from None
    recipe = config.model_dump(exclude_unset=True)
    recipe["data"] |= {"prefix": CORPUS} | ({"vocab": VOCAB} if vocab else {})
    own = {"deepspeed": DEEPSPEED, "train_tokens": cell.tokens, "seed": point.seed, "save": ".", "load": "."}
    recipe["run"] |= own
    return RunPlan(point, steps, ranks, recipe, deepspeed)


def write_plan(folder: Path, plan: RunPlan) -> None:
    """Write both files into the run's folder, unless they are there.

    Raises:
        InputError: the folder holds a run with other settings.
    """
    check_plan(folder, plan)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _texts(plan).items():
        if not (folder / name).exists():
            write_text(folder / name, text)


def check_plan(folder: Path, plan: RunPlan) -> None:
    """Compare the run's folder, if it is there, with what the study says now.

    Raises:
        InputError: it holds a run with other settings; names the first. Or its checkpoint is of other ranks, of whose
            optimizer states each holds a part.
    """
    ranks = ranks_before(folder)
    if ranks not in (None, plan.ranks) and (folder / "latest").exists() and not (folder / RESULT).exists():
        raise InputError(
            f"{folder}: interrupted with --ranks {ranks}, and its checkpoint does not fit --ranks {plan.ranks}: "
            f"give --ranks {ranks}, or remove the folder to do this run again"
        )
    for name, values, read in ((RECIPE, plan.recipe, yaml.safe_load), (DEEPSPEED, plan.deepspeed, json.loads)):
        path = folder / name
        if path.exists():
            there = read(path.read_text(encoding="utf-8"))
            if there != values:
                raise InputError(
                    f"{path}: {_difference(there, values)}, so its result would be of another study: give another "
                    f"--output, change the study back, or remove {folder} to do this run again"
                )


def _texts(plan: RunPlan) -> dict[str, str]:
    head = f"# {plan.point.id}: {plan.steps} steps. The trainer's working directory is this folder.\n"
    return {
        RECIPE: head + yaml.safe_dump(plan.recipe, sort_keys=False),
        DEEPSPEED: json.dumps(plan.deepspeed, indent=2) + "\n",
    }


def _deepspeed(study: Study, point: Point, base: dict[str, Any], steps: int, *, ranks: int) -> dict[str, Any]:
    """The recipe's JSON with the study's changes, without its monitors: the lab reads metrics.jsonl."""
    own = ("optimizer", "gradient_accumulation_steps", *MONITORS)
    kept = {key: value for key, value in base.items() if key not in own}
    values = _merge(_merge({"scheduler": SCHEDULE}, kept), study.deepspeed)
    optimizer = study.optimizers[point.cell.optimizer]
    values |= {
        "train_batch_size": point.cell.batch,
        "train_micro_batch_size_per_gpu": _micro_batch(study, point, ranks=ranks),
        "optimizer": {"type": optimizer.type, "params": {"lr": point.lr} | optimizer.params},
    }
    warmup = {"total_num_steps": steps, "warmup_num_steps": max(1, round(study.warmup * steps))}
    return _merge(values, {"scheduler": {"params": warmup}})


def _micro_batch(study: Study, point: Point, *, ranks: int) -> int:
    """The largest that divides the batch and is not above the study's."""
    limit = study.models[point.cell.model].micro_batch or study.micro_batch
    per_rank = point.cell.batch // max(1, ranks)
    return max((size for size in range(1, limit + 1) if per_rank % size == 0), default=limit)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]


def _difference(there: Any, here: Any, where: str = "") -> str:
    """The first setting in which two nested dictionaries differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *here]:
            if there.get(key) != here.get(key) or (key in there) != (key in here):
                return _difference(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
    return f"{where} was {there!r} and is {here!r} now"
