# SPDX-License-Identifier: Apache-2.0
"""The optimizers that MERIT is compared with, over the same layouts and exchanges.

Each is an `optimizer.type` of a DeepSpeed JSON and a plain PyTorch optimizer. They run on plain torch operations.
"""

from merit_ds.baselines.lamb import MeritLAMB, MeritMaxLAMB
from merit_ds.baselines.lars import MeritLARS
from merit_ds.baselines.lion import MeritLion
from merit_ds.baselines.scion import MeritScion
from merit_ds.baselines.sophia import MeritSophiaG

__all__ = ["MeritLAMB", "MeritLARS", "MeritLion", "MeritMaxLAMB", "MeritScion", "MeritSophiaG"]
