# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps, exchanges and moves: the package's own by asking them, DeepSpeed's by a table."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from merit_ds import OPTIMIZERS
from merit_ds.baselines import MeritScion
from merit_ds.errors import InputError
from merit_ds.ops.rule import Norm
from merit_ds.registration import spellings
from merit_ds.training.deepspeed_config import optimizer_type, parameter_groups, section


@dataclass(frozen=True)
class Optimizer:
    """What the plan asks of an `optimizer.type`.

    Attributes:
        name: the class, or DeepSpeed's name.
        moments: float32 numbers kept for each weight, beside its float32 master copy.
        norm: by which it compares weights with updates, and so what its ranks exchange of cut weights; None: nothing.
        settings: of its groups, which decide what a layout measures.
        moved_bytes: bytes that a step must read and write for each weight, master copy, gradient and moments.
        momentum: how ranks come to the whole momentum of a matrix that is cut: not at all, by sending each other their
            pieces (DeepSpeed's Muon), or by adding them up (MeritScion).
    """

    name: str
    moments: int
    norm: Norm | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    moved_bytes: int = 0
    momentum: Literal["", "pieces", "sum"] = ""

    @property
    def slot_bytes(self) -> int:
        """Of one norm of a weight and of its update."""
        return 0 if self.norm is None else 2 * self.norm.dtype.itemsize


_KEPT = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1, "muon": 2}
"""Of DeepSpeed's own optimizers; Muon's are its Adam's."""


def optimizer_of(ds_config: dict[str, Any]) -> Optimizer:
    """Raises: InputError: the plan does not know the JSON's optimizer, or that refuses its `params`."""
    kind, params = optimizer_type(ds_config), section(ds_config, "optimizer", "params")
    ours = {name: found for found in OPTIMIZERS for name in spellings(found)}
    given = ds_config["optimizer"]["type"]
    if given in ours:
        try:
            optimizer = ours[given]([torch.zeros(1)], **params)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer.params: {error}") from None
        moments, norm = len(optimizer.rule.moments), optimizer.rule.norm
        settings = optimizer.settings_for_layout(optimizer.param_groups[0])
        found = Optimizer(type(optimizer).__name__, moments, norm, settings, _moved(moments, norm))
        return replace(found, momentum="sum") if isinstance(optimizer, MeritScion) else found
    if kind not in _KEPT:
        known = ", ".join([*(found.__name__ for found in OPTIMIZERS), *_KEPT])
        raise InputError(f"optimizer.type {given!r}: the plan knows {known}")
    found = Optimizer(str(given), _KEPT[kind], moved_bytes=_moved(_KEPT[kind], None))
    return replace(found, momentum="pieces") if kind == "muon" else found


def optimizer_groups(ds_config: dict[str, Any], names: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The optimizer's groups, as the trainer makes them and as DeepSpeed splits them for Muon, which gets the matrices
    whose names have neither "embed" nor "lm_head" in them and keeps one moment: a group's `use_muon`.

    Args:
        names: the model's parameters by name.
    """
    groups = parameter_groups(ds_config, names.values())
    if optimizer_type(ds_config) != "muon":
        return groups
    adams = {id(p) for name, p in names.items() if p.dim() < 2 or "embed" in name.lower() or "lm_head" in name.lower()}
    halves = []
    for group in groups:
        for use_muon in (True, False):
            half = [p for p in group["params"] if (id(p) not in adams) is use_muon and p.requires_grad]
            if use_muon:
                half.sort(key=lambda p: tuple(p.shape), reverse=True)  # Muon's constructor does
            halves += [{"params": half, "use_muon": use_muon}] if half else []
    return halves


def _moved(moments: int, norm: Norm | None) -> int:
    """4 bytes each: the gradient read, weight and moments read and written; with norms, which need a second pass,
    weight and moments read once more."""
    once = 4 * (1 + 2 * (1 + moments))
    return once if norm is None else once + 4 * (1 + moments)
