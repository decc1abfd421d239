# SPDX-License-Identifier: Apache-2.0
"""CUDA architectures: which to compile for, and which GPUs the result runs on."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from merit_ds.ops.builder.toolchain import BuildError, Compiler

_MINIMUM = (7, 5)
_PORTABLE = ((8, 0), (9, 0), (10, 0))
_VARIABLE = "TORCH_CUDA_ARCH_LIST"


class Arch(NamedTuple):
    """One entry of `TORCH_CUDA_ARCH_LIST`: 9.0, 9.0a (for exactly this GPU) or 9.0+PTX (and for all later ones)."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor

    def nvcc_args(self) -> list[str]:
        number = f"{self.major}{self.minor}{self.suffix}"
        kinds = ["sm", "compute"] if self.ptx else ["sm"]
        return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on its own major version from its minor one on; PTX on everything later."""
        if self.suffix:
            return capability == self.capability
        return capability >= self.capability and (self.ptx or capability[0] == self.major)


def parse_archs(text: str) -> list[Arch]:
    """Entries between semicolons or blanks, as PyTorch's build reads them, but without its names such as Hopper.

    Raises:
        BuildError: an entry is not understood.
    """
    archs = []
    for entry in re.split(r"[;\s]+", text.strip("; \t")):
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if found is None:
            raise BuildError(f"{_VARIABLE}={text}: '{entry}' is not understood: write numbers, such as 8.0;9.0+PTX")
        archs.append(Arch(int(found[1]), int(found[2]), found[3], found[4] is not None))
    return archs


def visible_capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU that PyTorch sees."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def choose_archs(nvcc: Compiler, *, portable: bool) -> tuple[Arch, ...]:
    """What `TORCH_CUDA_ARCH_LIST` says; else the visible GPUs; without any, or if `portable`, 8.0;9.0;10.0+PTX.

    Entries below 7.5 are left out where others remain: lists that are made for all of PyTorch often begin there.

    Raises:
        BuildError: nothing remains, or nvcc cannot compile for it.
    """
    known = {
        (int(major), int(minor))
        for major, minor in re.findall(r"compute_(\d+)(\d)$", nvcc.run(["--list-gpu-arch"]), re.MULTILINE)
    }
    named = os.environ.get(_VARIABLE, "").strip("; \t")
    if named and named != "native":
        archs = parse_archs(named)
        origin = f"{_VARIABLE}={named}"
    elif not portable and (capabilities := visible_capabilities()):
        archs = [_nearest(capability, known) for capability in capabilities]
        origin = "the GPUs here"
    else:
        numbers = [capability for capability in _PORTABLE if capability in known]
        archs = [Arch(*capability, ptx=capability == numbers[-1]) for capability in numbers]
        origin = f"{nvcc.version} below {nvcc.command[0]}"
    archs = sorted({arch for arch in archs if arch.capability >= _MINIMUM})
    if not archs:
        raise BuildError(f"{origin}: the CUDA kernel needs compute capability 7.5 (Turing) or newer")
    unknown = [str(arch) for arch in archs if arch.capability not in known]
    if unknown:
        raise BuildError(
            f"{origin}: nvcc ({nvcc.version}) cannot compile for {', '.join(unknown)}: correct {_VARIABLE}, or set "
            "CUDA_HOME to another CUDA toolkit"
        )
    return tuple(archs)


def covered(archs: Sequence[Arch], capabilities: Sequence[tuple[int, int]]) -> bool:
    """Whether each GPU can run code for one of the architectures."""
    return all(any(arch.runs_on(capability) for arch in archs) for capability in capabilities)


def _nearest(capability: tuple[int, int], known: set[tuple[int, int]]) -> Arch:
    """For a GPU newer than nvcc: the newest that nvcc knows, with PTX, which the driver compiles for the GPU."""
    if capability in known:
        return Arch(*capability)
    older = [candidate for candidate in known if candidate < capability]
    return Arch(*max(older), ptx=True) if older else Arch(*capability)
