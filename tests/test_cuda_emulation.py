# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA that the kernels are tested by: it sees the bugs that are planted in small kernels."""

import pytest
from emulation.compiler import FOLDER, compile_emulated, run_sanitized


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_emulated(FOLDER / "planted.cu", tmp_path_factory.mktemp("planted") / "planted")


@pytest.mark.parametrize("seed", range(10))
def test_right_kernels_pass(program, seed):
    done = run_sanitized([program, "right", seed])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("missing_barrier", "wrong result"),
        ("uninitialised_shared", "wrong result"),
        ("past_shared", "heap-buffer-overflow"),
        ("wide_past_end", "heap-buffer-overflow"),
        ("misaligned_wide", "misaligned address"),
        ("divergent_barrier", "32 of 64 threads wait for the others at the barrier"),
        ("two_barriers", "threads wait at different barriers"),
        ("missing_lane", "31 lanes of a warp wait"),
        ("outside_mask", "a shuffle reads lane"),
        ("not_in_mask", "is not in its own mask 0000ffff"),
    ],
)
def test_a_planted_bug_is_seen(program, bug, message):
    for seed in range(3):
        done = run_sanitized([program, bug, seed])
        assert done.returncode != 0
        assert message in done.stderr


def test_blocks_and_threads_come_in_an_order_that_the_seed_decides(program):
    orders = [run_sanitized([program, "order", seed]).stdout for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    numbers = [int(word) for word in orders[0].split()[:-1]]
    blocks = [number // 64 for number in numbers]
    assert sorted(numbers) == list(range(3 * 64))
    assert numbers[:64] != sorted(numbers[:64]) and len(set(blocks[:64])) == 1
