# SPDX-License-Identifier: Apache-2.0
"""Makes `"optimizer": {"type": "Merit"}`, and the baselines' types, known to DeepSpeed.

DeepSpeed has no hook for optimizers of others. It looks an unknown type up as an attribute of `torch.optim`, which is
its documented way to bring one, and lets ZeRO wrap only the exact types in a list of its own.
"""

import sys

import torch


def spellings(optimizer: type[torch.optim.Optimizer]) -> list[str]:
    """The names by which a JSON may ask for it: its own, in capitals, in small letters."""
    name = optimizer.__name__
    return [name, name.upper(), name.lower()]


def register(optimizer: type[torch.optim.Optimizer]) -> None:
    """Set the optimizer's name, in this spelling, in capitals and in small letters, as attributes of `torch.optim`.

    Raises:
        RuntimeError: a name is taken by somebody else; nothing is overwritten.
    """
    names = spellings(optimizer)
    for name in names:
        present = getattr(torch.optim, name, optimizer)
        if (
            getattr(present, "__module__", None) != optimizer.__module__
        ):  # a reloaded module's class is another object, but ours
            raise RuntimeError(f"torch.optim.{name} is already {present!r}: merit_ds does not overwrite it")
    for name in names:
        setattr(torch.optim, name, optimizer)


def allow_under_zero(optimizer: type[torch.optim.Optimizer]) -> None:
    """Enter the type in DeepSpeed's list, so that `zero_allow_untested_optimizer` is not needed.

    DeepSpeed builds the JSON's optimizer just before it looks at the list. A script that constructs Merit itself must
    import DeepSpeed before; where it was never imported nothing happens.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    if zero is not None and optimizer not in zero.ZERO_SUPPORTED_OPTIMIZERS:
        zero.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
