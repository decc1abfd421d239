# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: registers, memory instructions, roundings, and a library that loads anywhere."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from emulation.kernel import Kernel

from merit_ds.ops.builder import CUDAMeritBuilder

ARCHS = ("80", "90", "100")
REGISTERS = 64
"""With 256 threads a block, four blocks share a multiprocessor's 65,536 registers."""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The folder in which the library and its PTX lie, and what ptxas said."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH: the CUDA kernels cannot be compiled here")
    builder, folder = CUDAMeritBuilder(), tmp_path_factory.mktemp("nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    missing = [arch for arch in ARCHS if f"compute_{arch}" not in known]
    if missing:
        pytest.skip(f"this nvcc cannot compile for sm_{missing[0]}")
    command = [nvcc, *builder.nvcc_args(), *builder.extra_ldflags(), "-Xptxas", "-v", "--keep", "--keep-dir", folder]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command += [builder.ROOT / "csrc" / "merit_cuda.cu", "-o", folder / "merit_cuda.so"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return folder, done.stdout + done.stderr


def test_no_kernel_spills_and_four_blocks_fit_a_multiprocessor(build):
    kernels = build[1].split("Compiling entry function")[1:]
    for arch in ARCHS:
        named = [text for text in kernels if f"for 'sm_{arch}'" in text]
        assert len(named) == 4, "two passes, each with a small and a large block of parameters"
        for text in named:
            assert int(re.search(r"Used (\d+) registers", text)[1]) <= REGISTERS
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_is_accessed_16_bytes_at_a_time_and_nothing_is_fused(build, arch):
    ptx = (build[0] / f"merit_cuda.compute_{arch}.ptx").read_text()
    kernels = re.findall(r"\.entry \w*?(accumulate_tiles|apply_tiles)\w*\((.*?)\n}", ptx, re.DOTALL)
    assert len(kernels) == 4
    for name, text in kernels:
        first = name == "accumulate_tiles"
        loads, stores = (4, 2) if first else (3, 1)  # of a tile with float32 weights and gradients
        assert len(re.findall(r"ld\.global\.v4\.[fbu]32", text)) >= loads
        assert len(re.findall(r"st\.global\.v4\.[fbu]32", text)) >= stores
        assert re.search(r"ld\.global\.v4\.[bu]16", text), "8 bytes of bfloat16 or float16"
        assert "div.rn.f32" in text and "sqrt.rn.f32" in text
        assert ("redux.sync.max.u32" in text) == first
    for wrong in ("fma.", "mad.f32", "mad.rn", ".ftz", ".approx", ".local"):
        assert wrong not in ptx


def test_a_launch_without_a_gpu_returns_a_text(build):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    kernel = Kernel(build[0] / "merit_cuda.so")
    nothing = np.zeros((1, 9), np.int64)
    for function in ("accumulate", "apply", "step"):
        text = kernel.run(function, nothing[:0], nothing, nothing, np.zeros((1, 2), np.uint32))
        assert re.fullmatch(r"cuda\w+: .+", text)
    assert kernel.run("step", nothing[:0], nothing[:0], nothing, np.zeros((1, 2), np.uint32)) is None
