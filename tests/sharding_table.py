# SPDX-License-Identifier: Apache-2.0
"""The text of docs/sharding.md: what `matrix` says of every cell. `test_matrix` writes it once all of that held."""

import json
from pathlib import Path

from matrix import AXES, PRECISIONS, ROWS, STAGES, Cell, cell_of, diverges, pairwise, refusal, sticks, wrapper_name

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "sharding.md"
RANKS = f"{min(AXES['ranks'])}-{max(AXES['ranks'])}"

INTRODUCTION = """\
# Exact under every sharding

Sharding never changes Merit's result: given the same gradients, weights and moments are those of the unsharded
optimizer, bit for bit. The tables say under which DeepSpeed JSON that was tested. In short: in fp32, `bf16`, `fp16` and
`torch_autocast` bfloat16, whatever DeepSpeed accepts of these options at stages 0, 1 and 2 is exact.

How to read a cell:

- **exact ({ranks})**: at 1, 2, 3 and 4 ranks, a DeepSpeed engine trained a small model of odd shapes for four steps.
  After each step the master weights, both moments and the model's own weights were equal, bit for bit, to a replay of
  the same averaged and clipped gradients by the unsharded reference, `merit_ds/reference.py`. Under ZeRO each call of
  the optimizer made one all-reduce. With *Inf*, DeepSpeed leaves two of the steps out: they changed nothing.
- **NaN, as unsharded ({ranks})**: the same, where DeepSpeed lets Inf pass: the weights become the reference's, NaN.
- **refused: key**: Merit raises an error that names the key of the JSON to change.
- **DeepSpeed refuses: why**: DeepSpeed raises an error, whatever the optimizer.
- **never steps again ({ranks})**: a fault of this DeepSpeed, whatever the optimizer. Nothing changes, bit for bit.

A table's first row is the plain JSON: `gradient_clipping` 1, no accumulation, one group of parameters. Every further
row changes only what it names. {pairs} more cells combine options, so that every two that can meet do; all are exact.
"""
NOTES = """\
¹ DeepSpeed refuses `fp16` where its accelerator does not report it, as on a CPU without fp16 instructions; there these
cells would be skipped. The tests lift that one check, since torch computes fp16 on every CPU.

Stage 0 and `BF16_Optimizer` ignore most options of `zero_optimization`; exact then means that the key does no harm.
With `offload_optimizer`, `BF16_Optimizer` gives way to `DeepSpeedZeroOptimizer`. On a CPU `pin_memory` pins nothing.
`torch_autocast` in float16 is refused under ZeRO because DeepSpeed's gradient scaler decides on each rank, and for
each group of parameters, whether to leave a step out, while the ranks exchange maxima in every step.

Tested with {versions} on gloo. `make test-full` runs every cell and writes this page;
`make test` runs the combined cells, and fails if the page is not the one that belongs to `tests/matrix.py`.
"""
KINDS = {
    "groups": "{} groups of parameters",
    "frozen": "a frozen parameter",
    "empty": "a parameter of zero elements",
    "tied": "a tied parameter",
    "unused": "parameters without a gradient in a step",
    "overflow": "*Inf* in one rank's gradient",
}


def document() -> str:
    """The page."""
    versions = " and ".join(f"{name} {version}" for name, version in pinned_versions().items())
    tables = [f"## Stage {stage}\n\n{_table(stage)}" for stage in STAGES]
    introduction = INTRODUCTION.format(ranks=RANKS, pairs=len(pairwise()))
    return "\n".join([introduction, *tables, NOTES.format(versions=versions)])


def pinned_versions() -> dict[str, str]:
    """The versions of torch and DeepSpeed in constraints.txt."""
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {name: version for name, version in lines if name in ("torch", "deepspeed")}


def _table(stage: int) -> str:
    columns = [{"wrapper": (stage, precision)} for precision in PRECISIONS]
    lines = [["JSON, model", *PRECISIONS], ["---"] * (len(columns) + 1)]
    lines.append(["DeepSpeed's wrapper", *(_wrapper(cell_of(column)) for column in columns)])
    lines += [[_row_label(row), *(_verdict(cell_of(row | column)) for column in columns)] for row in ROWS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _wrapper(cell: Cell) -> str:
    expected, name = refusal(cell), wrapper_name(cell)
    if expected is not None and expected.by == "DeepSpeed":
        return ""
    return "none" if name == "Merit" else f"`{name}`"


def _row_label(row: Cell) -> str:
    words = [
        KINDS[name].format(value) if name in KINDS else f"`{name.split('.')[-1]}: {json.dumps(value)}`"
        for name, value in row.items()
    ]
    return ", ".join(words) or "plain"


def _verdict(cell: Cell) -> str:
    expected = refusal(cell)
    if expected is not None:
        return f"{'refused' if expected.by == 'Merit' else 'DeepSpeed refuses'}: {expected.reason}"
    verdict = "NaN, as unsharded" if diverges(cell) else "never steps again" if sticks(cell) else "exact"
    return f"{verdict} ({RANKS}){' ¹' if 'fp16' in cell['wrapper'][1] else ''}"
