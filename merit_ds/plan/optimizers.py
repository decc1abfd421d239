# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps, exchanges and moves: the package's own by asking them, DeepSpeed's by a table."""

from dataclasses import dataclass, field
from typing import Any

import torch

from merit_ds import OPTIMIZERS
from merit_ds.errors import InputError
from merit_ds.ops.rule import Norm
from merit_ds.registration import spellings
from merit_ds.training.deepspeed_config import optimizer_type, section


@dataclass(frozen=True)
class Optimizer:
    """What the plan asks of an `optimizer.type`.

    Attributes:
        name: the class, or DeepSpeed's name.
        moments: float32 numbers kept for each weight, beside its float32 master copy.
        norm: by which it compares weights with updates, and so what its ranks exchange of cut weights; None: nothing.
        settings: of its groups, which decide what a layout measures.
        moved_bytes: bytes that a step must read and write for each weight, master copy, gradient and moments.
    """

    name: str
    moments: int
    norm: Norm | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    moved_bytes: int = 0

    @property
    def slot_bytes(self) -> int:
        """Of one norm of a weight and of its update."""
        return 0 if self.norm is None else 2 * self.norm.dtype.itemsize


_MOMENTS = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1}
"""Of DeepSpeed's own optimizers."""


def optimizer_of(ds_config: dict[str, Any]) -> Optimizer:
    """Raises: InputError: the plan does not know the JSON's optimizer."""
    kind, params = optimizer_type(ds_config), section(ds_config, "optimizer", "params")
    ours = {name: found for found in OPTIMIZERS for name in spellings(found)}
    given = ds_config["optimizer"]["type"]
    if given in ours:
        if ours[given].__name__ == "MeritScion":
            raise InputError("optimizer.type MeritScion: the plan does not know what its ranks exchange")
        optimizer = ours[given]([torch.zeros(1)], **params)
        moments, norm = len(optimizer.rule.moments), optimizer.rule.norm
        settings = optimizer.settings_for_layout(optimizer.param_groups[0])
        return Optimizer(type(optimizer).__name__, moments, norm, settings, _moved(moments, norm))
    if kind not in _MOMENTS:
        known = ", ".join([*(found.__name__ for found in OPTIMIZERS), *_MOMENTS])
        raise InputError(f"optimizer.type {given!r}: the plan knows {known}")
    return Optimizer(str(given), _MOMENTS[kind], moved_bytes=_moved(_MOMENTS[kind], None))


def _moved(moments: int, norm: Norm | None) -> int:
    """4 bytes each: the gradient read, weight and moments read and written; with norms, which need a second pass,
    weight and moments read once more."""
    once = 4 * (1 + 2 * (1 + moments))
    return once if norm is None else once + 4 * (1 + moments)
