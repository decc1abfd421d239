# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.doctor`: what `ds_report` is for DeepSpeed."""

import argparse
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from merit_ds.ops.builder import BUILDERS, BuildError, MeritBuilder
from merit_ds.ops.builder.cache import cache_folder
from merit_ds.ops.builder.toolchain import Compiler, driver_cuda_version, find_cxx, find_nvcc

Rows = list[tuple[str, str]]

# Transformer Engine's and apex's wheels go by several names; what is not installed is left out.
_PACKAGES = (
    *("merit-ds", "torch", "deepspeed", "megatron-core", "apex", "transformer-engine", "transformer-engine-torch"),
    *("transformers", "accelerate", "triton"),
)
_VARIABLES = (
    *("MERIT_BUILD_OPS", "MERIT_BUILD_CPU", "MERIT_BUILD_CUDA", "MERIT_CPU_CAPABILITY", "TORCH_EXTENSIONS_DIR"),
    *("XDG_CACHE_HOME", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_PREPEND_FLAGS"),
    *("NVCC_APPEND_FLAGS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH"),
)
_GREEN, _YELLOW, _RED = 32, 33, 31


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if a device of this machine has to do without its kernel, else 0."""
    parser = argparse.ArgumentParser(
        "python -m merit_ds.doctor",
        description="What Merit finds on this machine: versions, compilers, its kernels, and what to do about one that "
        "is missing. Exits with 1 if a device of this machine has to do without its kernel, else with 0.",
    )
    parser.add_argument(
        "--build", action="store_true", help="first compile the kernels that this machine's devices lack"
    )
    options = parser.parse_args(arguments)
    needed = [builder() for builder in BUILDERS if builder.NAME == "merit_cpu" or _gpu_rows()]
    if options.build:
        for builder in needed:
            with suppress(BuildError):  # the report says it
                builder.load()
    _print("Versions", _version_rows())
    _print("Machine", _machine_rows())
    _print("Compilers", [("C++", _compiler(find_cxx)), ("nvcc", _compiler(find_nvcc))])
    states = {builder.NAME: _state(builder(), needed=builder in map(type, needed)) for builder in BUILDERS}
    _print("Kernels", [*((name, text) for name, (text, _) in states.items()), ("cache", _cache())])
    _print("Environment", [(name, os.environ[name]) for name in _VARIABLES if name in os.environ] or [("", "none set")])
    return int(not all(fine for _, fine in states.values()))


def _version_rows() -> Rows:
    rows = [("python", f"{platform.python_version()}, {sys.executable}")]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            rows.append((package, version(package)))
    cuda = torch.version.cuda
    return [*rows, ("torch's CUDA", cuda or ("none: it is built for ROCm" if torch.version.hip else "none"))]


def _machine_rows() -> Rows:
    driver = driver_cuda_version()
    return [
        ("platform", platform.platform()),
        (
            "CPU",
            f"{_cpu_name()}, {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()} by PyTorch's count",
        ),
        ("CUDA driver", "none" if driver is None else f"serves CUDA {driver[0]}.{driver[1]}"),
        *(_gpu_rows() or [("GPU", "none that PyTorch sees")]),
    ]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_rows() -> Rows:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        (f"GPU {index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        for index, gpu in enumerate(found)
    ]


def _compiler(find: Callable[[], Compiler]) -> str:
    try:
        compiler = find()
    except BuildError as error:
        return f"none: {error}"
    return f"{' '.join(compiler.command)}: {compiler.version}"


def _cache() -> str:
    try:
        return str(cache_folder())
    except BuildError as error:
        return f"none: {error}"


def _state(builder: MeritBuilder, *, needed: bool) -> tuple[str, bool]:
    """What is the matter with a kernel, and whether its devices are served."""
    others = "" if needed else " (no device here needs it)"
    try:
        library, how = builder.prebuilt(), "prebuilt"
        if library is None:
            others += "".join(
                f" ({path} is not for these sources and devices)"
                for path in builder.PREBUILT.glob(f"{builder.NAME}-*.so")
            )
            recipe = builder.recipe()
            library, how = builder.cached(recipe), "in the cache"
            if not library.exists():
                builder.probe(recipe)
                text = f"would compile at first use, for {recipe.target}, in about {builder.SECONDS} s"
                return _coloured(text, _YELLOW) + others, True
        loaded = builder.load()
    except BuildError as error:
        return _coloured("cannot be had", _RED if needed else _YELLOW) + f"{others}: {error}", not needed
    return f"{_coloured(how, _GREEN)}{_capability(loaded)}: {library}{others}", True


def _capability(library: ctypes.CDLL) -> str:
    """The instruction set that the CPU's kernel has picked."""
    if not hasattr(library, "merit_capability"):
        return ""
    library.merit_capability.restype = ctypes.c_char_p
    name = library.merit_capability()
    return f", runs as {name.decode()}" if name else ", but MERIT_CPU_CAPABILITY names none that it and this CPU have"


def _print(title: str, rows: Rows) -> None:
    print(_coloured(title, 1))
    for label, text in rows:
        print(f"  {label:<21} {text}")


def _coloured(text: str, code: int) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    sys.exit(main())
