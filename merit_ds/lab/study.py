# SPDX-License-Identifier: Apache-2.0
"""A study's YAML, read into validated, frozen objects.

A study says which runs to compare: optimizers, learning rates, batches, seeds and models, at one token budget. Every
other value is the recipe's that `base` names, so a study holds differences alone. It names no corpus: that is an
argument of `python -m merit_ds.lab run`, since the same study serves any text.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from merit_ds.errors import InputError
from merit_ds.training.config import Section, explain

BEST = "best"


class Optimizer(Section):
    """What a label in the study's tables and plots stands for."""

    type: str = Field(description="optimizer.type of the DeepSpeed JSON")
    params: dict[str, Any] = Field(default={}, description="optimizer.params, without lr")
    lr_of: str | None = Field(default=None, description="an ablation of that optimizer: `lr: best` means its best")

    @model_validator(mode="after")
    def _no_learning_rate(self) -> "Optimizer":
        if "lr" in self.params:
            raise ValueError("params.lr is the grids' to set: write lr in grids")
        return self


class Model(Section):
    """Differences of one model from the study's recipe."""

    base: str | None = Field(default=None, description="another recipe, relative to the study")
    set: dict[str, Any] = Field(default={}, description="changes to the recipe, as `section.key: value`")
    micro_batch: int | None = Field(default=None, gt=0, description="in place of the study's")
    lr_of: str | None = Field(default=None, description="`lr: best` means that model's best")


class Grid(Section):
    """Runs of each optimizer with each batch, seed, model and learning rate."""

    name: str
    optimizer: list[str] = Field(min_length=1, description="labels")
    batch: list[int] = Field(min_length=1, description="sequences of an optimizer step")
    seed: list[int] = Field(default=[1], min_length=1, description="weights and data order")
    model: list[str] | None = Field(default=None, description="labels; may be left out where there is one model")
    lr: Any = Field(description="list, {from, to, factor}, either for each optimizer by label, or `best`")
    tokens: int | None = Field(default=None, gt=0, description="another budget than the study's")
    extend: int = Field(
        default=0,
        ge=0,
        description="learning rates that may be added, one by one, while the best is at the grid's edge",
    )
    within: float = Field(
        default=0.0,
        ge=0,
        description="with `lr: best`, every rate whose loss is this near to the lowest runs too, and the mean decides",
    )

    @model_validator(mode="after")
    def _learning_rates_are_there(self) -> "Grid":
        if self.lr != BEST:
            for label in self.optimizer:
                self.learning_rates(label)
            if self.within:
                raise ValueError("within belongs to a grid with `lr: best`, not to one that lists its learning rates")
        elif self.extend:
            raise ValueError("extend belongs to a grid that lists its learning rates, not to `lr: best`")
        return self

    def learning_rates(self, label: str) -> list[float]:
        """The peak learning rates that this grid lists for an optimizer, ascending.

        Raises:
            ValueError: there are none, or one is not a positive number.
        """
        value = self.lr
        if isinstance(value, dict) and not set(value) <= {"from", "to", "factor"}:
            if unused := [key for key in value if key not in self.optimizer]:
                raise ValueError(f"lr names {unused[0]!r}, which is not in the grid's optimizer list")
            if label not in value:
                raise ValueError(f"lr has nothing for {label!r}")
            value = value[label]
        rates = _progression(value) if isinstance(value, dict) else value
        if not isinstance(rates, list) or not rates or not all(_is_positive(rate) for rate in rates):
            raise ValueError(f"lr of {label} must be positive numbers, {{from, to, factor}} or `best`, not {value!r}")
        return sorted({float(rate) for rate in rates})


class Study(Section):
    """What `python -m merit_ds.lab run` reads."""

    base: str = Field(description="the recipe, relative to the study")
    tokens: int = Field(gt=0, description="budget of every run; steps = floor(tokens / batch / seq_length)")
    micro_batch: int = Field(gt=0, description="sequences of one forward pass of a rank, at most")
    set: dict[str, Any] = Field(default={}, description="changes to the recipe, as `section.key: value`")
    deepspeed: dict[str, Any] = Field(default={}, description="merged into the recipe's DeepSpeed JSON")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the steps")
    evaluations: int = Field(default=20, gt=0, description="validation losses of a run, evenly spread")
    telemetry_samples: int | None = Field(default=None, gt=0, description="samples of a run; sets telemetry.interval")
    checkpoints: int = Field(
        default=10, gt=0, description="checkpoints of a run, to continue from after an interruption"
    )
    keep_checkpoints: bool = Field(default=False, description="keep the last one after the run is done")
    ranks: int = Field(default=1, gt=0, description="ranks of a run, all on one machine")
    optimizers: dict[str, Optimizer] = Field(min_length=1)
    models: dict[str, Model] = Field(default={"default": Model()}, min_length=1)
    grids: list[Grid] = Field(min_length=1)

    @model_validator(mode="after")
    def _labels_are_known(self) -> "Study":
        for grid in self.grids:
            _check_labels(f"grid {grid.name!r}: optimizer", grid.optimizer, self.optimizers)
            _check_labels(f"grid {grid.name!r}: model", self.models_of(grid), self.models)
            borrowed = [self.optimizers[label].lr_of for label in grid.optimizer]
            borrowed += [self.models[label].lr_of for label in self.models_of(grid)]
            if grid.within and any(borrowed):
                raise ValueError(f"grid {grid.name!r}: within is for what has learning rates of its own, not for lr_of")
        for kind, entries in (("optimizers", self.optimizers), ("models", self.models)):
            for label, entry in entries.items():
                if entry.lr_of is not None:
                    _check_labels(f"{kind}.{label}.lr_of", [entry.lr_of], entries)
            names = [slug(label) for label in entries]
            if twice := [label for label, name in zip(entries, names, strict=True) if names.count(name) > 1]:
                raise ValueError(f"{kind}: {' and '.join(twice)} give the same folder name; rename one")
        return self

    def models_of(self, grid: Grid) -> list[str]:
        """The grid's model labels.

        Raises:
            ValueError: it names none, and the study has several.
        """
        if grid.model is None and len(self.models) > 1:
            raise ValueError(f"grid {grid.name!r}: say which model, one or more of {', '.join(self.models)}")
        return list(self.models) if grid.model is None else grid.model


def load_study(path: Path) -> Study:
    """Read and validate a study. The recipes that it names are not read.

    Raises:
        InputError: one line that names the file, the key and the nearest known one.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the study: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: a study has the keys {', '.join(Study.model_fields)}; see configs/studies for examples"
        )
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Study)}") from None


def slug(label: str) -> str:
    """A label as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+]+", "_", label).strip("_")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {node.start_mark.line + 1} and below")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _progression(value: dict[str, Any]) -> list[float]:
    """from, from * factor, ... up to `to`, each rounded to six digits."""
    if set(value) != {"from", "to", "factor"} or not all(_is_positive(number) for number in value.values()):
        raise ValueError("lr: from, to and factor must all be given, as positive numbers")
    if value["factor"] <= 1 or value["to"] < value["from"]:
        raise ValueError("lr: factor must be above 1, and to not below from")
    rates, rate = [], float(value["from"])
    while rate <= value["to"] * (1 + 1e-6):
        rates.append(float(f"{rate:.6g}"))
        rate *= value["factor"]
    return rates


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_labels(where: str, labels: list[str], known: dict[str, Any]) -> None:
    for label in labels:
        if label not in known:
            raise ValueError(f"{where}: {label!r} is not defined; there are {', '.join(known)}")
