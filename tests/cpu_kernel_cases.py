# SPDX-License-Identifier: Apache-2.0
"""What tests/test_cpu_kernel.py runs in a process of its own: cases of the CPU's kernel.

    python cpu_kernel_cases.py LIBRARY CASE FIRST_SEED SEEDS

Every buffer lies between two pages that cannot be touched, at the end or at the beginning of what can.
"""

import ctypes
import mmap
import resource
import sys

import numpy as np
from emulation.kernel import Batch, Tensors, hyper_rows
from emulation.layouts import BFLOAT16, FLOAT16, FLOAT32, Flat, Plan, Weight, random_plan

LIBC = ctypes.CDLL(None, use_errno=True)
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
HYPER = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "clip": 1.0,
    "eps_inside_sqrt": False,
    "lr": 1e-2,
}
LARGE = [  # divided among threads, in strips, in more pieces than one, with more updates than are kept
    *(("matrix", 40, 5001), ("matrix", 3, 70001), ("matrix", 150001, 1), ("matrix", 1400, 1000)),
    *(("vector", 1, 300001), ("unscaled", 1, 600001), ("matrix", 1, 140001)),
]


def fenced(array, *, at_end):
    """A copy of an array: one element further lies a page that ends the process."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    memory = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for address in (memory.ctypes.data, memory.ctypes.data + page + room):
        assert LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    start = page + (room - array.nbytes if at_end else 0)
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Shard:
    """A rank's tensors, between fences, its tiles and the rows of scalars."""

    def __init__(self, plan, rank, rng):
        for flat in plan.flats:  # rounding such a NaN as if it were a number would give a zero
            flat.state["g"].view(np.uint32)[np.isnan(flat.state["g"])] = 0x7FFFFFFF
        self.tensors, self.table, self.hypers = Tensors(plan, rank, rng), table(plan, rank), hyper_rows(plan.hypers)
        for stored in self.tensors.stored:
            for values in stored.values():
                values.memory = fenced(values.memory, at_end=rng.random() < 0.7)


def table(plan, rank):
    """Tiles [n, 9] of a rank as large as they can be: whole rows together, cut rows alone."""
    records = []
    for number, flat in enumerate(plan.flats):
        for weight in flat.weights:
            hyper = plan.hypers.index(weight.hyper)
            for tile in _rectangles(weight, flat.bounds[rank], flat.bounds[rank + 1]):
                records.append((number, *tile, weight.whole_slot, hyper))
    return np.array(records, np.int64).reshape(-1, 9)


def _rectangles(weight, begin, end):
    rows, cols = weight.positions.shape
    first = np.clip(begin - weight.positions[:, 0], 0, cols)
    last = np.clip(end - weight.positions[:, 0], 0, cols)
    whole = (first == 0) & (last == cols)
    joined = np.append(whole[1:] & whole[:-1] & weight.together, False)
    row = 0
    while row < rows:
        stop = row + int(np.argmin(joined[row:])) + 1
        if first[row] < last[row]:
            col = int(first[row])
            axes = (int(weight.row_slots[row]), weight.col_slot + col) if weight.kind == "matrix" else (-1, -1)
            yield int(weight.positions[row, col]) - begin, cols, stop - row, int(last[row]) - col, *axes
        row = stop


def run(library, name, shard, maxima, *, noop=None, threads=1, records=None):
    """Call one of the library's functions; returns its text."""
    records = shard.tensors.records() if records is None else records
    arrays = {"tiles": shard.table, "tensors": records, "hypers": shard.hypers, "maxima": maxima, "noop": noop}
    batch = Batch(
        **{key: None if array is None else array.ctypes.data for key, array in arrays.items()},
        tile_count=len(shard.table),
        tensor_count=len(records),
        threads=threads,
    )
    text = getattr(library, f"merit_{name}")(ctypes.byref(batch))
    return None if text is None else text.decode()


def zeros(plan):
    return fenced(np.zeros((plan.slots, 2), np.uint32), at_end=True)


def sharded(library, rng, seed):
    """Several ranks: each accumulates alone, the maxima of all are combined, each applies."""
    ranks = int(rng.integers(1, 6))
    plan = random_plan(rng, ranks=ranks, flats=int(rng.integers(1, 4)), dtypes=DTYPES)
    check_cut(library, plan, stepped(plan), rng, seed, ranks=ranks, threads=int(rng.integers(1, 5)))


def whole(library, rng, seed):
    """Both passes in one call."""
    plan = random_plan(rng, ranks=1, flats=int(rng.integers(1, 9)), dtypes=DTYPES)
    check_whole(library, plan, stepped(plan), rng, seed, threads=int(rng.integers(1, 5)))


def large(library, rng, seed):
    """Tensors of some size."""
    plan = large_plan(rng)
    expected = stepped(plan)
    for threads in (1, 2, 3):
        check_whole(library, plan, expected, rng, seed, threads=threads)
    check_cut(library, plan, expected, rng, seed, ranks=1, threads=2)


def stepped(plan):
    return [flat.stepped() for flat in plan.flats]


def check(text):
    assert text is None, text


def check_cut(library, plan, expected, rng, seed, *, ranks, threads):
    shards = [Shard(plan, rank, rng) for rank in range(ranks)]
    maxima = [zeros(plan) for _ in shards]
    for shard, own in zip(shards, maxima, strict=True):
        check(run(library, "accumulate", shard, own, threads=threads))
    combined = fenced(np.max(maxima, axis=0), at_end=True)
    for shard in shards:
        check(run(library, "apply", shard, combined, threads=threads))
        shard.tensors.compare(expected, seed)


def check_whole(library, plan, expected, rng, seed, *, threads):
    shard = Shard(plan, 0, rng)
    check(run(library, "step", shard, zeros(plan), threads=threads))
    shard.tensors.compare(expected, seed)


def large_plan(rng):
    """All of LARGE in one tensor, float32."""
    weights, start, slots = [], 3, 0
    for kind, rows, cols in LARGE:
        weight = Weight(np.arange(start, start + rows * cols).reshape(rows, cols), kind, HYPER)
        start += rows * cols
        if kind != "unscaled":
            weight.whole_slot, slots = slots, slots + 1
        if kind == "matrix":
            weight.col_slot, weight.row_slots = slots, slots + cols + np.arange(rows)
            slots += rows + cols
        weights.append(weight)
    state = {name: rng.standard_normal(start, np.float32) for name in "wgm"}
    state["v"] = rng.random(start, np.float32)
    return Plan([Flat(weights, state, {"w": FLOAT32, "g": FLOAT32}, [0, start])], slots, [HYPER])


def other_rounding(library, rng, seed):
    """Whatever the process has set, subnormals and rounding are IEEE 754's, and what it has set stays. x86 only."""
    plan = random_plan(rng, ranks=1, flats=3, dtypes=DTYPES)
    for flat in plan.flats:
        for name in "gmv":
            flat.state[name] *= np.float32(1e-39) / np.float32(1 + flat.dtypes.get(name, 0))
        flat.state["g"][:] = 0  # low-precision gradients have no such values
    shard, maxima, expected = Shard(plan, 0, rng), zeros(plan), stepped(plan)
    before, environment = (np.zeros(8, np.uint32) for _ in range(2))  # fenv_t: its last word is MXCSR
    LIBC_M.fegetenv(before.ctypes.data_as(ctypes.c_void_p))
    environment[:] = before
    environment[7] |= 0x8000 | 0x0040 | 0x4000  # flush to zero, denormals are zero, round up
    LIBC_M.fesetenv(environment.ctypes.data_as(ctypes.c_void_p))
    text = run(library, "step", shard, maxima, threads=2)
    LIBC_M.fegetenv(environment.ctypes.data_as(ctypes.c_void_p))
    LIBC_M.fesetenv(before.ctypes.data_as(ctypes.c_void_p))
    check(text)
    assert environment[7] & 0xC040 == 0xC040
    shard.tensors.compare(expected, seed)


def called_off(library, rng, seed):
    """Whatever the flag holds but zero, nothing changes; neither without tiles, nor where something is wrong."""
    plan = random_plan(rng, ranks=1, flats=2, dtypes=(FLOAT32,))
    shard, maxima, unchanged = Shard(plan, 0, rng), zeros(plan), [flat.state for flat in plan.flats]
    tiles, records = shard.table, shard.tensors.records()
    wrong = records.copy()
    wrong["dtype"][-1, 1] = 3
    outside = tiles.copy()
    outside[-1, 0] = len(records)
    for flag, some, sets, expected in (
        *((flag, tiles, records, None) for flag in (1.0, np.nan, -1e-45)),
        (0.0, tiles[:0], records, None),
        (0.0, tiles, wrong, f"tensor {len(records) - 1} has an unknown dtype"),
        (0.0, outside, records, f"tile {len(tiles) - 1} lies in no tensor"),
    ):
        shard.table = some
        for name in ("accumulate", "apply", "step"):
            text = run(library, name, shard, maxima, noop=np.array([flag], np.float32), records=sets, threads=2)
            assert text == expected, text
            shard.tensors.compare(unchanged, seed)
            assert not maxima.any()


def no_memory(library, rng, seed):
    """A step without room for its scratch changes nothing and says so."""
    whole(library, rng, seed)
    plan = large_plan(rng)
    shard, maxima, unchanged = Shard(plan, 0, rng), zeros(plan), [flat.state for flat in plan.flats]
    LIBC.malloc_trim(0)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * mmap.PAGESIZE
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), limits[1]))
    text = run(library, "step", shard, maxima, threads=8)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert text == "out of memory: nothing was changed", text
    shard.tensors.compare(unchanged, seed)
    assert not maxima.any()


LIBC_M = ctypes.CDLL("libm.so.6")
CASES = {case.__name__: case for case in (sharded, whole, large, other_rounding, called_off, no_memory)}


def main():
    path, case, first, count = sys.argv[1:]
    library = ctypes.CDLL(path)
    for name in ("merit_accumulate", "merit_apply", "merit_step", "merit_capability"):
        getattr(library, name).restype = ctypes.c_char_p
    print(library.merit_capability().decode())
    for seed in range(int(first), int(first) + int(count)):
        CASES[case](library, np.random.default_rng(seed), seed)


if __name__ == "__main__":
    main()
