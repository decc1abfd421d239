# SPDX-License-Identifier: Apache-2.0
"""`python -m merit_ds.doctor`, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch


def doctor(*options: str, **variables: str) -> tuple[int, str]:
    """Its exit status and what it prints; CUDA's kernel is another file's subject."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-m", "merit_ds.doctor", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def row(report: str, label: str) -> str:
    (text,) = re.findall(rf"^  {re.escape(label)} +(.*)$", report, re.MULTILINE)
    return text


def test_a_kernel_that_is_missing_is_compiled_on_demand(tmp_path: Path) -> None:
    status, report = doctor("--build")
    assert status == 0
    assert re.match(r"(prebuilt|in the cache), runs as (scalar|avx2|avx512): /.*\.so$", row(report, "merit_cpu"))
    assert "\033" not in report
    status, report = doctor(TORCH_EXTENSIONS_DIR=str(tmp_path), MERIT_CPU_CAPABILITY="scalar")
    assert status == 0
    assert re.search(r"would compile at first use, .* about \d+ s|^prebuilt", row(report, "merit_cpu"))
    assert row(report, "cache") == f"{tmp_path}/merit_ds"
    assert row(report, "TORCH_EXTENSIONS_DIR") == str(tmp_path)
    assert row(report, "torch") == torch.__version__ and row(report, "deepspeed")
    assert not list(tmp_path.iterdir()), "a report without --build writes nothing"


def test_without_a_compiler_it_says_why_and_fails(tmp_path: Path) -> None:
    status, report = doctor("--build", TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nonexistent")
    if not row(report, "merit_cpu").startswith("prebuilt"):
        assert status == 1
        assert row(report, "merit_cpu").startswith("cannot be had: no C++ compiler: CXX=/nonexistent names no program")
    assert row(report, "C++").startswith("none: no C++ compiler: CXX=/nonexistent")
    assert "(no device here needs it)" in row(report, "merit_cuda")
