# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources for the CPU, with the sanitizers, and runs what came of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def compile_emulated(source, output, *flags, sanitize=True):
    """A CUDA source, by g++ and the emulation; -O0 compiles in seconds where -O1 takes half a minute."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the emulation of CUDA needs it")
    command = ["g++", "-x", "c++", "-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall"]
    command += ["-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    if sanitize:
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [*flags, "-include", FOLDER / "cuda_emulation.h", source, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find -lasan" in done.stderr or "libasan" in done.stderr:
        pytest.skip("g++ has no AddressSanitizer here")
    assert done.returncode == 0, done.stderr
    return output


def run_sanitized(command, *, preload=False):
    """Run a program; with `preload`, one that knows nothing of AddressSanitizer and loads a library that does."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if preload:
        asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment.update(LD_PRELOAD=asan.stdout.strip(), PYTHONPATH=str(FOLDER.parent), OPENBLAS_NUM_THREADS="1")
        command = [sys.executable, *command]
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
