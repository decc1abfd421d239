# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels into the package if `MERIT_BUILD_OPS`, `MERIT_BUILD_CPU` or `MERIT_BUILD_CUDA` is 1.

All else about the package stands in pyproject.toml.
"""

import sys
import types
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).parent

# The package imports torch, which pip's isolated build does not have. The builders need none: empty packages stand in
# for those above them.
for name in ("merit_ds", "merit_ds.ops"):
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules[name] = package

from merit_ds.ops.builder import BuildError, MeritBuilder, wanted_builders  # noqa: E402

try:
    BUILDERS = wanted_builders(by_default=False)
except BuildError as error:
    sys.exit(f"error: {error}")


class BuildOps(Command):
    """A step of `build`, after the Python files are in their place."""

    description = "compile Merit's kernels"

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        try:
            for builder in BUILDERS:
                builder.build(self._folder(), portable=True)
        except BuildError as error:
            raise CompileError(str(error)) from None

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._folder().glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _folder(self) -> Path:
        inside = MeritBuilder.PREBUILT.relative_to(ROOT)
        return ROOT / inside if self.editable_mode else Path(self.build_lib or "") / inside


class OpsDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """A wheel with a library in it is for one platform."""
        return bool(BUILDERS)


class OpsWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """For one platform, but for every Python: ctypes loads the library."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


build.sub_commands.append(("build_ops", None))
setup(distclass=OpsDistribution, cmdclass={"build_ops": BuildOps, "bdist_wheel": OpsWheel})
