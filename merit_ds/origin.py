# SPDX-License-Identifier: Apache-2.0
"""What an optimizer was given: wrappers later replace the tensors of a group, and a schedule its learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError


@dataclass(frozen=True)
class Origin:
    """A group as it was given.

    Attributes:
        group: itself, as it is now.
        parameters, shapes, lr: as they were then.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    shapes: list[torch.Size]
    lr: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Origin":
        parameters = list(group["params"])
        return cls(group, parameters, [parameter.shape for parameter in parameters], float(group["lr"]))


def origin_of(group: dict[str, Any], origins: Sequence[Origin], *, name: str) -> Origin:
    """A group's own.

    Args:
        name: the optimizer's.

    Raises:
        UnsupportedError: there is none.
    """
    for origin in origins:
        if origin.group is group:
            return origin
    raise UnsupportedError(f"{name}'s param_groups were replaced: change the groups in place, or use add_param_group")
