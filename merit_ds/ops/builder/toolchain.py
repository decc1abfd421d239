# SPDX-License-Identifier: Apache-2.0
"""Finds the compilers and runs them."""

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from merit_ds.log import user_logger

_CXX = ("c++", "g++", "clang++")
_ERROR = re.compile(r"error|cannot find|undefined reference", re.IGNORECASE)


class BuildError(RuntimeError):
    """A kernel that cannot be had: one line that says what, where and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A compiler that answered to `--version`.

    Attributes:
        command: its path, and the arguments that `CXX` adds.
        version: the line in which it names itself and its version.
    """

    command: tuple[str, ...]
    version: str

    def run(self, arguments: Sequence[str], *, verbose: bool = False) -> str:
        """Its standard output. With `verbose`, the command and all that it prints are logged.

        Raises:
            BuildError: it failed; the message holds its first errors.
        """
        command = [*self.command, *arguments]
        try:
            # C: the errors are searched for in the output.
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=os.environ | {"LC_ALL": "C"}
            )
        except OSError as error:
            raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from None
        output = done.stderr + done.stdout
        if verbose:
            user_logger().info("%s\n%s", shlex.join(command), output)
        if done.returncode < 0:
            raise BuildError(f"{command[0]} was killed by {signal.Signals(-done.returncode).name}; is memory short?")
        if done.returncode > 0:
            raise BuildError(f"{command[0]} failed: {_first_errors(output) or f'exit status {done.returncode}'}")
        return done.stdout


def find_cxx() -> Compiler:
    """The C++ compiler that `CXX` names, else the first of c++, g++ and clang++.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").strip()
    for command in [shlex.split(named)] if named else [[name] for name in _CXX]:
        path = shutil.which(command[0])
        if path is not None:
            bare = Compiler((path, *command[1:]), path)
            return Compiler(bare.command, bare.run(["--version"]).partition("\n")[0].strip())
    if named:
        raise BuildError(f"no C++ compiler: CXX={named} names no program that can be run: correct CXX, or unset it")
    raise BuildError(
        f"no C++ compiler: none of {', '.join(_CXX)} is in PATH: install one (Debian: apt install g++), or set CXX"
    )


def find_nvcc() -> Compiler:
    """nvcc below `CUDA_HOME` or `CUDA_PATH`, in `PATH`, or in /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(f"{home}/bin" for home in homes), *os.get_exec_path(), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        raise BuildError(
            "no nvcc below CUDA_HOME or CUDA_PATH, in PATH or in /usr/local/cuda: install the CUDA toolkit, or set "
            "CUDA_HOME"
        )
    release = next((line for line in Compiler((path,), path).run(["--version"]).splitlines() if "release" in line), "")
    return Compiler((path,), release.strip())


def cuda_release(nvcc: Compiler) -> tuple[int, int]:
    """Major and minor version of the toolkit.

    Raises:
        BuildError: nvcc does not name it.
    """
    found = re.search(r"release (\d+)\.(\d+)", nvcc.version)
    if found is None:
        raise BuildError(f"{nvcc.command[0]} names no release in its --version: set CUDA_HOME to a CUDA toolkit")
    return int(found[1]), int(found[2])


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver here serves, or None without a driver. Makes no CUDA context."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def check_openmp(cxx: Compiler) -> None:
    """Compile and link two lines.

    Raises:
        BuildError: the compiler has no OpenMP, without which the kernel would run on one thread.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "openmp.cpp")
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        try:
            cxx.run(["-fopenmp", "-fPIC", "-shared", str(source), "-o", f"{scratch}/openmp.so"])
        except BuildError as error:
            raise BuildError(
                f"{cxx.version} compiles no OpenMP: {error}: install its OpenMP (clang: libomp), or set CXX to a GCC"
            ) from None


def check_cuda_host(nvcc: Compiler) -> None:
    """Preprocess an empty source.

    Raises:
        BuildError: nvcc refuses the host's compiler, or the runtime's headers are missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "empty.cu")
        source.touch()
        try:
            nvcc.run(["-E", str(source)])
        except BuildError as error:
            raise BuildError(
                f"nvcc ({nvcc.version}) does not work here: {error}: set CXX to a compiler that it supports, or "
                "CUDA_HOME to a complete CUDA toolkit"
            ) from None


def compile_library(
    compiler: Compiler,
    sources: Mapping[Path, Sequence[str]],
    library: Path,
    *,
    arguments: Sequence[str],
    link_arguments: Sequence[str],
    verbose: bool,
) -> None:
    """Compile the sources side by side and link them; `library` appears complete or not at all.

    Args:
        sources: each with the arguments that it alone gets.
        library: replaced if it is there; its folder must be.

    Raises:
        BuildError: the compiler failed.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}-") as scratch:
        objects = {source: f"{scratch}/{source.name}.o" for source in sources}

        def compile_one(source: Path) -> None:
            compiler.run([*arguments, *sources[source], "-c", str(source), "-o", objects[source]], verbose=verbose)

        with ThreadPoolExecutor(len(objects)) as pool:
            list(pool.map(compile_one, objects))
        linked = f"{scratch}/{library.name}"
        compiler.run([*link_arguments, *objects.values(), "-o", linked], verbose=verbose)
        os.replace(linked, library)


def _first_errors(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "; ".join(([line for line in lines if _ERROR.search(line)] or lines)[:3])
