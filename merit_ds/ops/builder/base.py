# SPDX-License-Identifier: Apache-2.0
"""What the kernels' builders share. Each kernel is a shared library with the C interface of `csrc/merit_abi.h`.

The libraries know nothing of torch, so that one build fits every version of it. A library's file name holds what it
is for and a hash of what it is made of:

    merit_cpu-x86_64-1f0c6b....so
    merit_cuda-x86_64-8.0_9.0_10.0+PTX-77d2ae....so

Built ahead of time, the hash is of sources, headers and flags: where it is used there need be no compiler. In the cache
it is also of the compiler.
"""

import ctypes
import hashlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from merit_ds.log import user_logger
from merit_ds.ops.builder.cache import cache_folder, turn
from merit_ds.ops.builder.toolchain import BuildError, Compiler, compile_library


@dataclass(frozen=True)
class Recipe:
    """How a kernel is compiled here.

    Attributes:
        compilers: the one that is run, and any that it runs itself.
        arguments: for compiling, beside each source's own.
        target: the machines that the result is for, as it stands in the file name.
    """

    compilers: tuple[Compiler, ...]
    arguments: tuple[str, ...]
    target: str


class MeritBuilder(ABC):
    """One kernel, with the vocabulary of DeepSpeed's `OpBuilder`."""

    NAME: ClassVar[str]
    BUILD_VAR: ClassVar[str]
    SECONDS: ClassVar[int]  # that compiling takes, about
    SOURCES: ClassVar[dict[str, tuple[str, ...]]]  # below ROOT, each with the flags that it alone gets
    ROOT: ClassVar[Path] = Path(__file__).parents[2]
    PREBUILT: ClassVar[Path] = Path(__file__).parents[1] / "lib"

    def absolute_name(self) -> str:
        return f"merit_ds.ops.lib.{self.NAME}"

    def sources(self) -> list[str]:
        """Relative to the package, as DeepSpeed's are to its own."""
        return list(self.source_args())

    def source_args(self) -> dict[str, tuple[str, ...]]:
        return self.SOURCES

    def include_paths(self) -> list[str]:
        return ["csrc"]

    def cxx_args(self) -> list[str]:
        return []

    def nvcc_args(self) -> list[str]:
        return []

    @abstractmethod
    def extra_ldflags(self) -> list[str]: ...

    @abstractmethod
    def recipe(self, *, portable: bool = False) -> Recipe:
        """Find the compiler.

        Args:
            portable: for other machines too, rather than for this one.

        Raises:
            BuildError: there is none, or it cannot compile the kernel.
        """

    @abstractmethod
    def fits(self, target: str) -> bool:
        """Whether a library with this in its name is for this machine."""

    @abstractmethod
    def probe(self, recipe: Recipe) -> None:
        """Try in a moment what could make the compiler fail.

        Raises:
            BuildError: the kernel cannot be compiled here.
        """

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the kernel could be compiled here; with `verbose`, why not is logged as a warning."""
        try:
            self.probe(self.recipe())
        except BuildError as error:
            if verbose:
                user_logger().warning("Merit: %s", error)
            return False
        return True

    def load(self, verbose: bool = False) -> ctypes.CDLL:
        """The library: built ahead of time, else from the cache, else compiled now.

        Args:
            verbose: log the compiler's commands and all its output.

        Raises:
            BuildError: it cannot be compiled, written or loaded.
        """
        library = self.prebuilt() or self._compiled_once(verbose=verbose)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(
                f"{self.NAME}: {library} cannot be loaded: {error}: remove it, and it will be compiled for this machine"
            ) from None

    def prebuilt(self) -> Path | None:
        """The library inside the package, if it was made from these sources and for this machine."""
        prefix, suffix = f"{self.NAME}-", f"-{self._source_key()}.so"
        found = sorted(self.PREBUILT.glob(f"{prefix}*{suffix}"))
        return next((path for path in found if self.fits(path.name[len(prefix) : -len(suffix)])), None)

    def cached(self, recipe: Recipe) -> Path:
        """Where the library is kept once it is compiled, whether or not it is there.

        Raises:
            BuildError: there is no place for it.
        """
        key = _hash([self._source_key(), repr(recipe)])
        return cache_folder() / f"{self.NAME}-{recipe.target}-{key}.so"

    def build(self, folder: Path, *, portable: bool, verbose: bool = False) -> Path:
        """Compile ahead of time into a folder, where the library replaces older ones; returns its path.

        Args:
            portable: as in `recipe`.
            verbose: as in `load`.

        Raises:
            BuildError: it cannot be compiled or written.
        """
        recipe = self.recipe(portable=portable)
        library = folder / f"{self.NAME}-{recipe.target}-{self._source_key()}.so"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._compile(recipe, library, verbose=verbose)
            for other in folder.glob(f"{self.NAME}-*.so"):
                if other != library:
                    other.unlink()
        except OSError as error:
            raise BuildError(f"{self.NAME}: cannot write to {folder}: {error.strerror}") from None
        return library

    def _compiled_once(self, *, verbose: bool) -> Path:
        recipe = self.recipe()
        library = self.cached(recipe)
        try:
            if library.exists():
                return library
            library.parent.mkdir(parents=True, exist_ok=True)
            with turn(library.with_suffix(".lock")):
                if not library.exists():
                    self._compile(recipe, library, verbose=verbose)
        except OSError as error:
            raise BuildError(
                f"{self.NAME}: cannot write to {library.parent}: {error.strerror}: set TORCH_EXTENSIONS_DIR to a "
                "folder that can be written"
            ) from None
        return library

    def _compile(self, recipe: Recipe, library: Path, *, verbose: bool) -> None:
        self.probe(recipe)
        compiler = recipe.compilers[0]
        logger = user_logger()
        logger.info(
            "Merit: compiling %s with %s into %s: about %d s, once",
            self.NAME,
            compiler.version,
            library.parent,
            self.SECONDS,
        )
        start = time.perf_counter()
        try:
            compile_library(
                compiler,
                {self.ROOT / source: flags for source, flags in self.source_args().items()},
                library,
                arguments=[*recipe.arguments, *(f"-I{self.ROOT / path}" for path in self.include_paths())],
                link_arguments=self.extra_ldflags(),
                verbose=verbose,
            )
        except BuildError as error:
            raise BuildError(f"{self.NAME} does not compile: {error}") from None
        logger.info("Merit: compiled %s in %.1f s", self.NAME, time.perf_counter() - start)

    def _source_key(self) -> str:
        """Of all that goes into the library from this package; a header counts whether or not it is included."""
        folders = [self.ROOT / path for path in self.include_paths()]
        headers = [path for folder in folders for ending in ("h", "cuh") for path in folder.glob(f"*.{ending}")]
        files = sorted([*headers, *(self.ROOT / source for source in self.sources())])
        flags = [self.source_args(), self.cxx_args(), self.nvcc_args(), self.extra_ldflags(), sys.platform]
        try:
            return _hash([repr(flags), *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files)])
        except OSError as error:
            raise BuildError(f"{self.NAME}: {error.filename}: {error.strerror}: install merit_ds anew") from None


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
