# SPDX-License-Identifier: Apache-2.0
"""Builds and loads the kernels, in the manner of DeepSpeed's op builders.

`setup.py` uses this package where neither torch nor DeepSpeed is installed, so it imports neither at module level.
"""

from merit_ds.ops.builder.base import MeritBuilder
from merit_ds.ops.builder.builders import BUILDERS, CPUMeritBuilder, CUDAMeritBuilder, wanted_builders
from merit_ds.ops.builder.toolchain import BuildError

__all__ = ["BUILDERS", "BuildError", "CPUMeritBuilder", "CUDAMeritBuilder", "MeritBuilder", "wanted_builders"]
