# SPDX-License-Identifier: Apache-2.0
"""Under what Merit is held against its unsharded reference, as data: wrappers, keys of the JSON, kinds of parameters.

A cell gives every axis one value. `cells` are the table in docs/sharding.md: every wrapper with every row of `ROWS`.
`pairwise` is a smaller choice of cells, in which every two values meet. A new value, axis or row appears in both. The
axes of `JSON_AXES` are keys of the DeepSpeed JSON; the model, `matrix_cases.Kinds`, reads the others.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

Cell = dict[str, Any]

FP32, BF16, BF16_FP32 = "fp32", "`bf16`", "`bf16`, `grad_accum_dtype: fp32`"
FP16, AUTOCAST_BF16, AUTOCAST_FP16 = "`fp16`", "`torch_autocast` bfloat16", "`torch_autocast` float16"
PRECISIONS: dict[str, dict[str, Any]] = {
    FP32: {},
    BF16: {"bf16": {"enabled": True}},
    BF16_FP32: {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    FP16: {"fp16": {"enabled": True, "initial_scale_power": 8}},  # a loss scale that does not overflow unasked
    AUTOCAST_BF16: {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    AUTOCAST_FP16: {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}
STAGES = (0, 1, 2)
OFFLOAD = "zero_optimization.offload_optimizer"
NORM = "zero_optimization.compute_grad_norm"
ACCUMULATION, CLIPPING, CHECK = "gradient_accumulation_steps", "gradient_clipping", "bf16.check_grad_overflow"

# The first value of an axis is its default.
AXES: dict[str, list[Any]] = {
    "wrapper": list(product(STAGES, PRECISIONS)),
    "ranks": [2, 3, 4, 1],
    ACCUMULATION: [1, 4],
    CLIPPING: [1.0, 0.0],
    "zero_optimization.overlap_comm": [False, True],
    "zero_optimization.reduce_scatter": [True, False],
    "zero_optimization.contiguous_gradients": [True, False],
    "zero_optimization.round_robin_gradients": [False, True],
    "zero_optimization.parameter_alignment": [False, True],
    OFFLOAD: [{"device": "none"}, {"device": "cpu"}, {"device": "cpu", "pin_memory": True}],
    NORM: [True, False],
    CHECK: [True, False],
    "groups": [1, 2, 3],
    "frozen": [False, True],
    "empty": [False, True],
    "tied": [False, True],
    "unused": [False, True],
    "overflow": [False, True],
}
JSON_AXES = [name for name in AXES if name in (ACCUMULATION, CLIPPING) or "." in name]
ROWS: list[Cell] = [
    {},
    *({name: value} for name in AXES if name not in ("wrapper", "ranks") for value in AXES[name][1:]),
    {NORM: False, CLIPPING: 0.0},
    {NORM: False, CLIPPING: 0.0, "overflow": True},
    {CHECK: False, "overflow": True},
    {OFFLOAD: {"device": "cpu"}, "overflow": True},
]
STEPS = 4
UNUSED = 1  # the step in which `unused` leaves parameters without a gradient
OVERFLOWS = (0, 2)  # before and after Merit has any state


@dataclass(frozen=True)
class Refusal:
    """An error that a user gets in place of a step.

    Attributes:
        by: "Merit" or "DeepSpeed".
        reason: for the table; Merit's refusals name the key.
        message: a part of the error.
        when: the values of the cell's axes that lead to it.
    """

    by: str
    reason: str
    message: str
    when: dict[str, tuple[Any, ...]]

    def concerns(self, cell: Cell) -> bool:
        values = cell | {"stage": cell["wrapper"][0], "precision": cell["wrapper"][1], "offload": offloads(cell)}
        return all(values[axis] in allowed for axis, allowed in self.when.items())


REFUSALS = (
    Refusal("DeepSpeed", "stages 1 and 2 only", "only with ZeRO Stage 1 or 2", {"stage": (0,), NORM: (False,)}),
    Refusal(
        "DeepSpeed",
        "dtype mix",
        "unsupported mix of model_dtype",
        {"stage": (0,), "precision": (BF16_FP32,)},
    ),
    Refusal(
        "DeepSpeed",
        "not with `grad_accum_dtype`",
        "BF16 parameters and FP32 gradient accumulation",
        {"stage": (1,), "precision": (BF16_FP32,), "offload": (False,), NORM: (False,)},
    ),
    Refusal(
        "DeepSpeed", "needs `gradient_clipping: 0`", "requires gradient_clipping=0", {NORM: (False,), CLIPPING: (1.0,)}
    ),
    Refusal("DeepSpeed", "not with offload", "not support optimizer offload", {NORM: (False,), "offload": (True,)}),
    Refusal(
        "Merit", "`torch_autocast.dtype`", "torch_autocast.dtype", {"stage": (1, 2), "precision": (AUTOCAST_FP16,)}
    ),
)


def refusal(cell: Cell) -> Refusal | None:
    """The error that the cell leads to, if any."""
    return next((refusal for refusal in REFUSALS if refusal.concerns(cell)), None)


def offloads(cell: Cell) -> bool:
    return bool(cell[OFFLOAD]["device"] == "cpu")


def wrapper_name(cell: Cell) -> str:
    """The class that DeepSpeed puts around the optimizer, "Merit" for none."""
    stage, precision = cell["wrapper"]
    if stage > 0:
        fp32_buffers = stage == 1 and precision == BF16_FP32 and not offloads(cell)
        return "BF16_Optimizer" if fp32_buffers else "DeepSpeedZeroOptimizer"
    return "FP16_UnfusedOptimizer" if precision in (BF16, FP16) else "Merit"


def skips_overflow(cell: Cell) -> bool:
    """Whether DeepSpeed leaves out a step whose gradient holds Inf or NaN."""
    stage, precision = cell["wrapper"]
    if wrapper_name(cell) == "Merit":
        return bool(precision == AUTOCAST_FP16)
    if stage == 0 or precision == FP16 or wrapper_name(cell) == "BF16_Optimizer":
        return True
    return bool(cell[CHECK] if precision in (BF16, BF16_FP32) else cell[NORM])


def diverges(cell: Cell) -> bool:
    """Whether an Inf gradient reaches the weights, as it does in plain PyTorch."""
    return bool(cell["overflow"] and not skips_overflow(cell))


def sticks(cell: Cell) -> bool:
    """Whether DeepSpeed 0.19.8 never steps again: with CPU offload, Inf can stay in the gradients that it keeps."""
    stage, precision = cell["wrapper"]
    kept = cell["unused"] or precision == BF16_FP32
    return bool(cell["overflow"] and stage > 0 and offloads(cell) and kept)


def steps_taken(cell: Cell) -> list[int]:
    """The steps of `STEPS` that DeepSpeed lets the optimizer take."""
    if not cell["overflow"] or diverges(cell):
        return list(range(STEPS))
    return [] if sticks(cell) else [step for step in range(STEPS) if step not in OVERFLOWS]


def config(cell: Cell) -> dict[str, Any]:
    """The DeepSpeed JSON of a cell, without the optimizer."""
    stage, precision = cell["wrapper"]
    result: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    result |= {section: dict(keys) for section, keys in PRECISIONS[precision].items()}
    for name in JSON_AXES:
        *section, key = name.split(".")
        (result.setdefault(section[0], {}) if section else result)[key] = cell[name]
    return result


def label(settings: Cell) -> str:
    """What differs from the defaults, for messages."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value != AXES[name][0]) or "defaults"


def trains(cell: Cell) -> bool:
    """Whether it ends with finite weights that have moved."""
    return refusal(cell) is None and not diverges(cell) and not sticks(cell)


def cell_of(settings: Cell) -> Cell:
    """A cell with defaults wherever `settings` are silent."""
    return {name: settings.get(name, values[0]) for name, values in AXES.items()}


def cells(ranks: int) -> list[Cell]:
    """Every cell of the table, at a number of ranks."""
    return [cell_of(row | {"wrapper": wrapper, "ranks": ranks}) for wrapper in AXES["wrapper"] for row in ROWS]


def pairwise() -> list[Cell]:
    """Few cells that train, together holding every two values that can meet in one; always the same.

    Greedy: the first pair that is left, in the best of a hundred random cells. Cells that diverge or stick are left
    out, since they hide what else might be wrong; the table has them.
    """
    choice = random.Random(0)
    left = {
        ((one, i), (other, j)): None  # the positions of values, which unlike the values can all be hashed
        for one, other in combinations(AXES, 2)
        for i, j in product(range(len(AXES[one])), range(len(AXES[other])))
    }
    chosen = []
    while left:
        pair = next(iter(left))
        fixed = {name: AXES[name][position] for name, position in pair}
        drawn = [{name: choice.choice(values) for name, values in AXES.items()} | fixed for _ in range(100)]
        possible = [cell for cell in drawn if trains(cell)]
        if not possible:
            del left[pair]
            continue
        best = max(possible, key=lambda cell: sum(pair in left for pair in pairs(cell)))
        chosen.append(best)
        for pair in pairs(best):
            left.pop(pair, None)
    return chosen


def pairs(cell: Cell) -> Iterator[tuple[tuple[str, int], ...]]:
    """Every two axes of a cell, each with the position of its value."""
    return combinations(((name, values.index(cell[name])) for name, values in AXES.items()), 2)
