# SPDX-License-Identifier: Apache-2.0
"""The operations of a step over many tensors at once: `accumulate`, `apply` with complete maxima, or both in `step`."""

from merit_ds.ops.kernel import Kernel
from merit_ds.ops.schema import OPERATIONS
from merit_ds.ops.select import kernel_name, select_kernel

__all__ = ["OPERATIONS", "Kernel", "kernel_name", "select_kernel"]
