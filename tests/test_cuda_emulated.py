# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: the same source, through the emulation and under the sanitizers, bit for bit numpy's.

Each case draws layouts at random: weights cut into shards anywhere, tiles of any allowed size and phase, addresses that
are not aligned, all dtypes and scalars, values that a maximum or a rounding could lose (tests/emulation).
"""

import pytest
from emulation.compiler import FOLDER, compile_emulated, run_sanitized

SOURCE = FOLDER.parents[1] / "merit_ds" / "csrc" / "merit_cuda.cu"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_emulated(SOURCE, tmp_path_factory.mktemp("cuda") / "merit.so", "-shared", "-fPIC")


def run_case(library, case, seeds):
    done = run_sanitized([FOLDER / "cases.py", library, case, "0", str(seeds)], preload=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("case", "seeds"),
    [
        ("exchanged", 20),
        ("low_precision", 15),
        ("one_launch", 10),
        ("many_tensors", 1),
        ("far_away", 4),
        ("called_off", 2),
        ("device_and_stream", 2),
    ],
)
def test_the_kernels_are_bitwise_right(library, case, seeds):
    run_case(library, case, seeds)


def test_reductions_of_turing_are_right(tmp_path):
    """GPUs before compute capability 8.0 reduce a warp by shuffles."""
    library = compile_emulated(SOURCE, tmp_path / "merit.so", "-shared", "-fPIC", "-D__CUDA_ARCH__=750")
    run_case(library, "exchanged", 5)
