# SPDX-License-Identifier: Apache-2.0
"""MERIT (arXiv 2508.20577) for large-batch training, exact under DeepSpeed ZeRO.

Importing the package registers the optimizer, so that a DeepSpeed JSON may say `"optimizer": {"type": "Merit"}`,
and the baselines that it is compared with.
"""

from merit_ds.baselines import MeritLAMB, MeritLARS, MeritLion, MeritMaxLAMB, MeritScion, MeritSophiaG
from merit_ds.errors import InputError, UnsupportedError
from merit_ds.marks import mark_parameters, split_qkv
from merit_ds.optimizer import Merit, MeritW
from merit_ds.registration import register

__all__ = [
    "OPTIMIZERS",
    "InputError",
    "Merit",
    "MeritLAMB",
    "MeritLARS",
    "MeritLion",
    "MeritMaxLAMB",
    "MeritScion",
    "MeritSophiaG",
    "MeritW",
    "UnsupportedError",
    "mark_parameters",
    "split_qkv",
]
__version__ = "0.1.0"

OPTIMIZERS = (Merit, MeritW, MeritLAMB, MeritMaxLAMB, MeritLARS, MeritLion, MeritSophiaG, MeritScion)
"""Every optimizer of the package, each an `optimizer.type` of a DeepSpeed JSON."""

for _optimizer in OPTIMIZERS:
    register(_optimizer)
