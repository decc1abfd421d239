# SPDX-License-Identifier: Apache-2.0
"""Random tensors, cut into shards and tiles as the CUDA kernels take them, and what a step must make of them."""

from dataclasses import dataclass, field

import numpy as np
from oracle import numpy_step

TILE_ROWS, TILE_SPAN = 64, 128
FLOAT32, BFLOAT16, FLOAT16 = range(3)
"""Codes of merit_abi.h."""


@dataclass
class Weight:
    """A logical matrix in a flat buffer. positions: [rows, cols], where its elements lie; a vector is one row."""

    positions: np.ndarray
    kind: str  # "matrix", "vector", "unscaled"
    hyper: dict
    whole_slot: int = -1
    col_slot: int = -1
    row_slots: np.ndarray | None = None  # [rows]

    @property
    def together(self):
        """Rows that can share a tile with the row before: next to it in memory and in the maxima."""
        found = self.positions[1:, 0] == self.positions[:-1, -1] + 1
        return found if self.row_slots is None else found & (np.diff(self.row_slots) == 1)


@dataclass
class Flat:
    """A flat buffer [n] of weights and padding, its state in float32, and the boundaries of its shards."""

    weights: list[Weight]
    state: dict[str, np.ndarray]  # w, g, m, v
    dtypes: dict[str, int]  # of w and g
    bounds: list[int]
    has_grad: bool = True

    def stepped(self):
        """The state after a step: w, m and v."""
        result = {name: self.state[name].copy() for name in "wmv"}
        for weight in self.weights if self.has_grad else []:
            at = weight.positions[0] if weight.kind == "vector" else weight.positions
            slices = (self.state[name][at] for name in "wgmv")
            for name, values in zip(
                "wmv", numpy_step(*slices, **weight.hyper, scaled=weight.kind != "unscaled"), strict=True
            ):
                result[name][at] = values
        result["w"] = rounded(result["w"], self.dtypes["w"])
        return result


@dataclass
class Plan:
    """Flat buffers on some ranks; their tiles name tensors by flat buffer and rank."""

    flats: list[Flat]
    slots: int = 0
    hypers: list[dict] = field(default_factory=list)

    def tiles(self, rng, rank):
        """Records [n, 8] of a rank's tiles, the first column being the flat buffer's number, in random order."""
        records = []
        for number, flat in enumerate(self.flats):
            begin, end = flat.bounds[rank], flat.bounds[rank + 1]
            for weight in flat.weights:
                hyper = self.hypers.index(weight.hyper)
                for tile in _tiles(rng, weight, begin, end):
                    records.append((number, *tile, weight.whole_slot, hyper))
        rng.shuffle(records)
        return np.array(records, np.int64).reshape(-1, 9)


def rounded(values, dtype):
    """float32 values to the nearest of a dtype, ties to even, as float32."""
    if dtype == FLOAT32:
        return values
    digits, smallest, largest = {BFLOAT16: (8, 2.0**-133, 255 * 2.0**120), FLOAT16: (11, 2.0**-24, 65504.0)}[dtype]
    wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    quantum = np.maximum(np.ldexp(1.0, np.frexp(np.where(finite, wide, 0))[1] - digits), smallest)
    with np.errstate(invalid="ignore"):
        nearest = np.rint(wide / quantum) * quantum
        nearest = np.where(np.abs(nearest) > largest, np.copysign(np.inf, wide), nearest)
    return np.where(finite, nearest, wide).astype(np.float32)


def random_plan(rng, *, ranks, flats, dtypes, largest=260):
    """Some flat buffers of random weights and values, each cut at random places, and slots for their maxima.

    Args:
        dtypes: of weights and gradients, to choose from.
        largest: columns of a matrix.
    """
    plan = Plan([_flat(rng, ranks, largest, *rng.choice(dtypes, 2)) for _ in range(flats)])
    weights = [weight for flat in plan.flats for weight in flat.weights]
    _allot_slots(rng, plan, weights)
    for weight in weights:
        if weight.hyper not in plan.hypers:
            plan.hypers.append(weight.hyper)
    return plan


def _flat(rng, ranks, largest, weight_dtype, grad_dtype):
    weights, start = [], int(rng.integers(0, 6))
    for _ in range(rng.integers(1, 4)):
        added = _weights(rng, start, largest)
        weights += added
        start = 1 + max(int(weight.positions.max()) for weight in added) + int(rng.integers(0, 4))
    dtypes = {"w": int(weight_dtype), "g": int(grad_dtype)}
    state = {"w": rng.normal(size=start), "g": rng.normal(size=start), "m": 0.1 * rng.normal(size=start)}
    state["v"] = np.abs(rng.normal(size=start))
    state = {name: values.astype(np.float32) for name, values in state.items()}
    for weight in weights:
        _plant_values(rng, weight, state)
    state = {name: rounded(values, dtypes.get(name, FLOAT32)) for name, values in state.items()}
    bounds = sorted([0, start, *rng.integers(0, start + 1, ranks - 1).tolist()])
    return Flat(weights, state, dtypes, bounds, has_grad=bool(rng.random() > 0.1))


def _weights(rng, start, largest):
    """One parameter's weights: a matrix, a vector, either without trust ratio, or a fused one's three matrices."""
    shape = rng.choice(["vector", "matrix", "aligned", "bands"], p=[0.25, 0.3, 0.3, 0.15])
    kind = "unscaled" if rng.random() < 0.15 else "vector" if shape == "vector" else "matrix"
    if shape == "vector":
        cols = int(rng.choice([1, 127, 128, 3 * largest, 36 * largest]))
        return [Weight(start + np.arange(cols).reshape(1, cols), kind, _hyper(rng))]
    rows, cols = int(rng.integers(1, largest // 3 + 1)), int(rng.integers(1, largest + 1))
    if shape == "aligned":
        cols = cols + 3 & ~3
    if shape != "bands":
        return [Weight(start + np.arange(rows * cols).reshape(rows, cols), kind, _hyper(rng))]
    groups, rows = int(rng.integers(1, 4)), rng.integers(1, 9, 3)
    every = start + np.arange(groups * rows.sum() * cols).reshape(groups, rows.sum(), cols)
    parts = np.split(every, np.cumsum(rows)[:2], axis=1)
    hyper = _hyper(rng)
    return [Weight(part.reshape(-1, cols), kind, hyper) for part in parts]


def _hyper(rng):
    return {
        "lr": float(rng.choice([1e-2, 3e-4])),
        "beta1": float(rng.choice([0.9, 0.8])),
        "beta2": 0.95,
        "eps": float(rng.choice([1e-6, 0.0, 1e-3])),
        "weight_decay": float(rng.choice([0.0, 0.1])),
        "clip": float(rng.choice([1.0, 0.5, np.inf])),
        "eps_inside_sqrt": bool(rng.random() < 0.3),
    }


def _plant_values(rng, weight, state):
    """What a maximum, a ratio or a rounding could get wrong."""
    at = weight.positions
    some = at[rng.integers(0, at.shape[0]), rng.integers(0, at.shape[1])]
    match rng.integers(0, 9):
        case 0:
            state["w"][at] = 0
        case 1:
            state["g"][some] = rng.choice([np.nan, np.inf, -np.inf])
        case 2:
            state["w"][some] = np.nan
        case 3:  # a row and a column without update
            for name in "wgm":
                state[name][at[rng.integers(0, at.shape[0])]] = 0
                state[name][at[:, rng.integers(0, at.shape[1])]] = 0
        case 4:
            for name in "wgmv":
                state[name][at] *= np.float32(1e-39)
        case 5:
            state["w"][at] *= np.float32(1e37)


def _allot_slots(rng, plan, weights):
    """Runs of slots in random order: a weight's whole, its columns, and its rows in pieces."""
    runs = []
    for weight in weights:
        rows, cols = weight.positions.shape
        if weight.kind != "unscaled":
            runs.append((weight, "whole", 0, 1))
        if weight.kind == "matrix":
            weight.row_slots = np.zeros(rows, np.int64)
            runs.append((weight, "cols", 0, cols))
            piece = int(rng.choice([1, 7, 64, rows]))
            runs += [(weight, "rows", row, min(piece, rows - row)) for row in range(0, rows, piece)]
    for number in rng.permutation(len(runs)):
        weight, what, first, size = runs[number]
        if what == "whole":
            weight.whole_slot = plan.slots
        elif what == "cols":
            weight.col_slot = plan.slots
        else:
            weight.row_slots[first : first + size] = np.arange(plan.slots, plan.slots + size)
        plan.slots += size


def _tiles(rng, weight, begin, end):
    """A weight's tiles inside a shard: offset, pitch, rows, cols, row slot, column slot."""
    rows, cols = weight.positions.shape
    first = np.clip(begin - weight.positions[:, 0], 0, cols)
    last = np.clip(end - weight.positions[:, 0], 0, cols)
    row = 0
    while row < rows:
        count, limit = 1, int(rng.choice([1, 9, TILE_ROWS]))
        while row + count < rows and count < limit and weight.together[row + count - 1]:
            if (first[row + count], last[row + count]) != (first[row], last[row]):
                break
            count += 1
        long = count == 1 and weight.kind != "matrix"
        col = int(first[row])
        while col < last[row]:
            offset = int(weight.positions[row, col]) - begin
            width = (TILE_ROWS * TILE_SPAN if long else TILE_SPAN) - offset % 4
            if rng.random() < 0.2:
                width = int(rng.integers(1, width + 1))
            width = min(width, int(last[row]) - col)
            axes = (int(weight.row_slots[row]), weight.col_slot + col) if weight.kind == "matrix" else (-1, -1)
            yield offset, cols, count, width, *axes
            col += width
        row += count
