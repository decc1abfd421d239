# SPDX-License-Identifier: Apache-2.0
"""The CPU's kernel for each vector width, bit for bit numpy's (tests/cpu_kernel_cases.py has the cases).

They run in processes of their own: what reads or writes outside its buffers ends its process.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation.compiler import run_sanitized

from merit_ds.ops.builder import CPUMeritBuilder
from merit_ds.ops.builder.toolchain import compile_library

CASES = Path(__file__).with_name("cpu_kernel_cases.py")
ON_X86 = platform.machine() == "x86_64"
CAPABILITIES = ["scalar", "avx2", "avx512"] if ON_X86 else ["scalar"]
REFUSED = "is not one that this processor offers"


def build(folder, *flags):
    """The library as the builder makes it, and with more flags."""
    builder = CPUMeritBuilder()
    compile_library(
        builder.recipe().compilers[0],
        {builder.ROOT / source: own for source, own in builder.source_args().items()},
        folder / "merit.so",
        arguments=[*builder.cxx_args(), *flags],
        link_arguments=[*builder.extra_ldflags(), *flags],
        verbose=False,
    )
    return folder / "merit.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cpu"))


def run_case(library, case, seeds, capability):
    # Waiting threads would take the processors from others that run here.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "MERIT_CPU_CAPABILITY": capability}
    command = [sys.executable, CASES, library, case, "0", str(seeds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def check_case(library, case, seeds, capability):
    done = run_case(library, case, seeds, capability)
    if REFUSED in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("case", "seeds"), [("sharded", 40), ("whole", 40), ("large", 1)])
def test_every_width_is_bitwise_right(library, case, seeds, capability):
    check_case(library, case, seeds, capability)


@pytest.mark.skipif(not ON_X86, reason="sets x86's control register")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_process_has_other_rounding(library, capability):
    check_case(library, "other_rounding", 6, capability)


@pytest.mark.parametrize(("case", "seeds"), [("called_off", 3), ("no_memory", 1)])
def test_nothing_is_changed(library, case, seeds):
    check_case(library, case, seeds, "scalar")


def test_the_widest_is_chosen_and_a_wrong_wish_refused(library):
    found = [name for name in CAPABILITIES if run_case(library, "whole", 1, name).returncode == 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MERIT_CPU_CAPABILITY", raising=False)
        kernel = ctypes.CDLL(str(library))
        kernel.merit_capability.restype = ctypes.c_char_p
        assert kernel.merit_capability().decode() == found[-1]
    refused = run_case(library, "whole", 1, "mmx")
    assert refused.stdout == "none\n"
    assert f"MERIT_CPU_CAPABILITY=mmx {REFUSED}: scalar" in refused.stderr


def test_the_sanitizers_find_nothing(tmp_path, monkeypatch):
    """Also where a wrong access stays between the fences."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the sanitizers' libraries are looked up there")
    library = build(tmp_path, "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for capability, case, seeds in [(CAPABILITIES[-1], "large", 1), *((name, "sharded", 10) for name in CAPABILITIES)]:
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        monkeypatch.setenv("MERIT_CPU_CAPABILITY", capability)
        done = run_sanitized([CASES, library, case, "0", str(seeds)], preload=True)
        assert done.returncode == 0 or REFUSED in done.stderr, done.stdout + done.stderr
