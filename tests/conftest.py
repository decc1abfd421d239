# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

import ctypes
from pathlib import Path

import pytest
from emulation.compiler import compile_emulated

from merit_ds.ops.native import cuda_kernel

CUDA_SOURCE = Path(__file__).parents[1] / "merit_ds" / "csrc" / "merit_cuda.cu"


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory):
    """The CUDA kernels as the package calls them, but emulated, for tensors on the CPU."""
    library = tmp_path_factory.mktemp("cuda") / "merit_cuda.so"
    compile_emulated(CUDA_SOURCE, library, "-shared", "-fPIC", sanitize=False)
    return cuda_kernel(ctypes.CDLL(str(library)))
