# SPDX-License-Identifier: Apache-2.0
"""What an implementation of the operations offers. All implementations of a rule give the same bits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_ds.ops.rule import Rule
from merit_ds.ops.table import Operands, Tile


@dataclass(frozen=True)
class Kernel:
    """One implementation.

    Attributes:
        name: for people.
        rule: whose arithmetic it does.
        accumulate, apply, step: the operations, called as those of `merit_ds.ops.eager`, with what a preparer returned
            in the operands' place.
        table: makes the rectangles' table on the operands' device, or where the implementation wants it.
        preparer: for weights of given sizes on a device, makes a function that turns the operands of each step into
            what the operations take, or raises ValueError, or UnsupportedError where another implementation can take
            them. It may remember what spares it work in the next step, but no gradient: that would hold its memory.
    """

    name: str
    rule: Rule
    accumulate: Callable[..., None]
    apply: Callable[..., None]
    step: Callable[..., None]
    table: Callable[[Iterable[Tile], torch.device], Tensor]
    preparer: Callable[[Sequence[int], torch.device], Callable[[Operands], Any]]
