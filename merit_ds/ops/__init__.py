# SPDX-License-Identifier: Apache-2.0
"""The two operations of a step on one fragment: `accumulate`, then `apply` once the maxima are complete."""

from merit_ds.ops.eager import Hyper, Maxima, accumulate, apply

__all__ = ["Hyper", "Maxima", "accumulate", "apply"]
