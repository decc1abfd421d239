# SPDX-License-Identifier: Apache-2.0
"""What an implementation of the operations offers. All implementations give the same bits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_ds.ops.table import Operands, Tile


@dataclass(frozen=True)
class Kernel:
    """One implementation.

    Attributes:
        name: for people.
        accumulate, apply, step: the operations, called as those of `merit_ds.ops.eager`, with what a preparer returned
            in the operands' place.
        table: makes the rectangles' table on the operands' device, or where the implementation wants it.
        preparer: makes a function that turns the operands of each step on a device into what the operations take. It
            may remember what spares it work in the next step, but no gradient: that would hold its memory.
    """

    name: str
    accumulate: Callable[..., None]
    apply: Callable[..., None]
    step: Callable[..., None]
    table: Callable[[Iterable[Tile], torch.device], Tensor]
    preparer: Callable[[], Callable[[Operands, torch.device], Any]]
