# SPDX-License-Identifier: Apache-2.0
"""What tests/test_cuda_emulated.py runs in a process with AddressSanitizer: one case of the emulated kernels.

python cases.py LIBRARY CASE FIRST_SEED SEEDS
"""

import sys

import numpy as np
from emulation.kernel import Kernel, Tensors, hyper_rows
from emulation.layouts import BFLOAT16, FLOAT16, FLOAT32, TILE_ROWS, TILE_SPAN, random_plan


def exchanged(kernel, rng, seed, *, dtypes=(FLOAT32,)):
    """Several ranks: each accumulates alone, the maxima of all are combined, each applies."""
    plan = random_plan(rng, ranks=int(rng.integers(1, 5)), flats=int(rng.integers(1, 4)), dtypes=dtypes)
    ranks = range(len(plan.flats[0].bounds) - 1)
    tensors = [Tensors(plan, rank, rng) for rank in ranks]
    tiles = [plan.tiles(rng, rank) for rank in ranks]
    maxima = np.zeros((len(ranks), plan.slots, 2), np.uint32)
    hypers, noop = hyper_rows(plan.hypers), np.zeros(1, np.float32)
    for rank in ranks:
        check(kernel.run("accumulate", tensors[rank].records(), tiles[rank], hypers, maxima[rank], noop=noop))
    combined = maxima.max(0)
    for rank in ranks:
        check(kernel.run("apply", tensors[rank].records(), tiles[rank], hypers, combined, noop=noop))
    expected = [flat.stepped() for flat in plan.flats]
    for shard in tensors:
        shard.compare(expected, seed)


def low_precision(kernel, rng, seed):
    """Weights and gradients in any dtype."""
    exchanged(kernel, rng, seed, dtypes=(FLOAT32, BFLOAT16, FLOAT16))


def at_once(kernel, rng, seed, *, ranks, **sizes):
    """All shards of all tensors in one batch, and both passes in one call. Returns the number of launches."""
    plan = random_plan(rng, ranks=ranks, dtypes=(FLOAT32, BFLOAT16), **sizes)
    tensors = [Tensors(plan, rank, rng) for rank in range(ranks)]
    tiles = [plan.tiles(rng, rank) for rank in range(ranks)]
    for rank, table in enumerate(tiles):
        table[:, 0] += rank * len(plan.flats)
    records, before = np.concatenate([shard.records() for shard in tensors]), kernel.value("launches")
    maxima = np.zeros((plan.slots, 2), np.uint32)
    check(kernel.run("step", records, np.concatenate(tiles), hyper_rows(plan.hypers), maxima))
    expected = [flat.stepped() for flat in plan.flats]
    for shard in tensors:
        shard.compare(expected, seed)
    return kernel.value("launches") - before


def one_launch(kernel, rng, seed):
    """One launch a pass, whatever the tensors."""
    assert at_once(kernel, rng, seed, ranks=2, flats=3) == 2


def many_tensors(kernel, rng, seed):
    """More than the small parameter block holds, and more than the large one."""
    assert at_once(kernel, rng, seed, ranks=4, flats=26, largest=6) == 2
    assert at_once(kernel, rng, seed, ranks=4, flats=206, largest=6) == 4


def far_away(kernel, rng, seed):
    """Offsets and slots beyond 2^32."""
    far = 2**33
    plan = random_plan(rng, ranks=1, flats=1, dtypes=(FLOAT32, FLOAT16))
    tensors, tiles = Tensors(plan, 0, rng), plan.tiles(rng, 0)
    tiles[:, 1] += far
    tiles[:, 5:8] += np.where(tiles[:, 5:8] < 0, 0, far)
    maxima = np.zeros((plan.slots, 2), np.uint32)
    check(kernel.run("step", tensors.records(far=far), tiles, hyper_rows(plan.hypers), maxima, far=far))
    tensors.compare([flat.stepped() for flat in plan.flats], seed)


def called_off(kernel, rng, seed):
    """Whatever the flag holds but zero, nothing changes; neither without tiles."""
    plan = random_plan(rng, ranks=1, flats=2, dtypes=(FLOAT32,))
    tensors, tiles = Tensors(plan, 0, rng), plan.tiles(rng, 0)
    unchanged = [flat.state for flat in plan.flats]
    maxima = np.zeros((plan.slots, 2), np.uint32)
    for flag, table in ((1.0, tiles), (np.nan, tiles), (-1e-45, tiles), (0.0, tiles[:0])):
        noop = np.array([flag], np.float32)
        check(kernel.run("step", tensors.records(), table, hyper_rows(plan.hypers), maxima, noop=noop))
        tensors.compare(unchanged, seed)
        assert not maxima.any()


def device_and_stream(kernel, rng, seed):
    """The launch goes to the batch's device and stream, the caller's device is current again, and errors are texts."""
    plan = random_plan(rng, ranks=1, flats=1, dtypes=(FLOAT32,))
    tensors, tiles = Tensors(plan, 0, rng), plan.tiles(rng, 0)
    maxima = np.zeros((plan.slots, 2), np.uint32)
    arguments = ("step", tensors.records(), tiles, hyper_rows(plan.hypers), maxima)
    check(kernel.run(*arguments, device=1, stream=0x1234))
    tensors.compare([flat.stepped() for flat in plan.flats], seed)
    assert kernel.value("launch_device") == 1 and kernel.value("launch_stream") == 0x1234
    assert kernel.value("device") == 0
    assert kernel.run(*arguments, device=2) == "cudaSetDevice: invalid device ordinal"
    assert kernel.value("device") == 0


def check(text):
    assert text is None, text


CASES = {
    case.__name__: case
    for case in (exchanged, low_precision, one_launch, many_tensors, far_away, called_off, device_and_stream)
}


def main():
    path, case, first, count = sys.argv[1:]
    kernel = Kernel(path)
    assert kernel.library.merit_tile_rows() == TILE_ROWS and kernel.library.merit_tile_span() == TILE_SPAN
    for seed in range(int(first), int(first) + int(count)):
        kernel.library.cuda_emulation_seed(seed)
        CASES[case](kernel, np.random.default_rng(seed), seed)


if __name__ == "__main__":
    main()
