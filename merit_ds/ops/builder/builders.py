# SPDX-License-Identifier: Apache-2.0
"""The builders of the two kernels, and which of them a build ahead of time includes."""

import os
import platform
from dataclasses import replace
from typing import ClassVar

from merit_ds.ops.builder.archs import choose_archs, covered, parse_archs, visible_capabilities
from merit_ds.ops.builder.base import MeritBuilder, Recipe
from merit_ds.ops.builder.toolchain import (
    BuildError,
    check_cuda_host,
    check_openmp,
    cuda_release,
    driver_cuda_version,
    find_cxx,
    find_nvcc,
)


class CPUMeritBuilder(MeritBuilder):
    """The kernel for tensors in host memory: C++ with OpenMP, which picks its vector width when it is loaded."""

    NAME = "merit_cpu"
    BUILD_VAR = "MERIT_BUILD_CPU"
    SECONDS = 10
    SOURCES: ClassVar = {"csrc/merit_cpu.cpp": (), "csrc/merit_cpu_scalar.cpp": ()}
    X86_SOURCES: ClassVar = {
        "csrc/merit_cpu_avx2.cpp": ("-mavx2", "-mf16c"),
        "csrc/merit_cpu_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl"),
    }

    def source_args(self) -> dict[str, tuple[str, ...]]:
        return self.SOURCES | (self.X86_SOURCES if platform.machine() == "x86_64" else {})

    def cxx_args(self) -> list[str]:
        # Without contraction, so that no multiply-add is rounded once instead of twice: all kernels give the same bits.
        return ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]

    def extra_ldflags(self) -> list[str]:
        return ["-shared", "-fopenmp"]

    def recipe(self, *, portable: bool = False) -> Recipe:
        return Recipe((find_cxx(),), tuple(self.cxx_args()), platform.machine())

    def fits(self, target: str) -> bool:
        return target == platform.machine()

    def probe(self, recipe: Recipe) -> None:
        check_openmp(recipe.compilers[0])


class CUDAMeritBuilder(MeritBuilder):
    """The kernel for tensors on NVIDIA GPUs. Needs nvcc and the runtime's headers, and a driver to run."""

    NAME = "merit_cuda"
    BUILD_VAR = "MERIT_BUILD_CUDA"
    SECONDS = 20
    SOURCES: ClassVar = {"csrc/merit_cuda.cu": ()}

    def nvcc_args(self) -> list[str]:
        return ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--threads", "0"]

    def extra_ldflags(self) -> list[str]:
        return ["-shared", "--cudart", "static"]

    def recipe(self, *, portable: bool = False) -> Recipe:
        nvcc, cxx = find_nvcc(), find_cxx()
        driver = None if portable else driver_cuda_version()
        if driver is not None and cuda_release(nvcc)[0] > driver[0]:
            raise BuildError(
                f"nvcc of CUDA {'.'.join(map(str, cuda_release(nvcc)))} makes nothing that this machine's driver runs, "
                f"which serves CUDA {'.'.join(map(str, driver))}: set CUDA_HOME to a toolkit of CUDA {driver[0]}"
            )
        archs = choose_archs(nvcc, portable=portable)
        if len(cxx.command) == 1:
            nvcc = replace(nvcc, command=(*nvcc.command, "-ccbin", *cxx.command))
        gencode = [argument for arch in archs for argument in arch.nvcc_args()]
        return Recipe((nvcc, cxx), (*self.nvcc_args(), *gencode), f"{platform.machine()}-{'_'.join(map(str, archs))}")

    def probe(self, recipe: Recipe) -> None:
        check_cuda_host(recipe.compilers[0])

    def fits(self, target: str) -> bool:
        machine, _, archs = target.partition("-")
        return machine == platform.machine() and covered(parse_archs(archs.replace("_", ";")), visible_capabilities())


BUILDERS: tuple[type[MeritBuilder], ...] = (CPUMeritBuilder, CUDAMeritBuilder)


def wanted_builders(*, by_default: bool) -> list[MeritBuilder]:
    """The builders of the kernels to build ahead of time.

    `MERIT_BUILD_OPS` asks for the CPU's, and for CUDA's where there is an nvcc; `MERIT_BUILD_CPU` and
    `MERIT_BUILD_CUDA` decide for one of them. All are 0 or 1.

    Args:
        by_default: what an unset `MERIT_BUILD_OPS` stands for.

    Raises:
        BuildError: a variable is neither 0 nor 1.
    """
    every = _flag("MERIT_BUILD_OPS", default=by_default)
    expected: dict[type[MeritBuilder], bool] = {CPUMeritBuilder: every, CUDAMeritBuilder: every and _has_nvcc()}
    return [builder() for builder, default in expected.items() if _flag(builder.BUILD_VAR, default=default)]


def _has_nvcc() -> bool:
    try:
        find_nvcc()
    except BuildError:
        return False
    return True


def _flag(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}={value}: write 0 or 1")
    return value == "1" if value else default
