# SPDX-License-Identifier: Apache-2.0
"""A kernel that compiles in a moment, for the tests of the builders, and compilers that misbehave on demand."""

from pathlib import Path
from typing import ClassVar

from merit_ds.ops.builder import CPUMeritBuilder

SOURCE = """
#include <omp.h>
#include "tiny.h"
#ifndef HALF
#error "a source has lost its own flag"
#endif
extern "C" int answer() {
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < HALF; ++i) sum += 1;
    return sum + other_half();
}
"""


def tiny_builder(root: Path) -> CPUMeritBuilder:
    """A builder of a kernel of two sources and a header below `root`, which answers 42."""
    csrc = root / "csrc"
    if not csrc.exists():
        csrc.mkdir(parents=True)
        (csrc / "tiny.cpp").write_text(SOURCE)
        (csrc / "other.cpp").write_text('#include "tiny.h"\nint other_half() { return OTHER; }\n')
        (csrc / "tiny.h").write_text("#define OTHER 21\nint other_half();\n")

    class TinyBuilder(CPUMeritBuilder):
        NAME = "tiny"
        ROOT = root
        PREBUILT = root / "lib"
        SOURCES: ClassVar = {"csrc/tiny.cpp": ("-DHALF=21",), "csrc/other.cpp": ()}
        X86_SOURCES: ClassVar = {}

    return TinyBuilder()


def compiler(path: Path, *, before: str = "", options: str = "") -> str:
    """A script that runs `before` in a shell and then the C++ compiler, but only answers when asked for its version."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\n{before}\nexec c++ "$@" {options}\n')
    path.chmod(0o755)
    return str(path)
