# SPDX-License-Identifier: Apache-2.0
"""Merit under real DeepSpeed ZeRO-1/2 on gloo ranks equals the unsharded reference bit for bit.

The averaged and clipped gradient that Merit was given is recorded and replayed unsharded: at 3 ranks the average
of equal gradients is inexact, and the norm that clips them is summed in an order that depends on the partition.
"""

import pytest
import torch
from ranks import run_ranks
from zero_cases import Case, check_case

FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    Case("stage 1, fp32", zero={"stage": 1}),
    Case("stage 2, fp32, 3 groups", zero={"stage": 2}, groups=3),
    Case("stage 1, bf16, 3 groups", "bf16", zero={"stage": 1}, groups=3),
    Case("stage 2, bf16", "bf16", zero={"stage": 2}),
    Case("stage 2, bf16, accumulation 3", "bf16", 3, {"stage": 2}, {"gradient_accumulation_steps": 3}),
    Case("BF16_Optimizer, 3 groups", "bf16", 3, {"stage": 1}, FP32_ACCUMULATION),
    Case("stage 2, round robin", "bf16", 3, {"stage": 2, "round_robin_gradients": True}),
    Case("stage 1, round robin", "fp32", 1, {"stage": 1, "round_robin_gradients": True}),
    Case("stage 2, padded parameters", "bf16", 3, {"stage": 2, "parameter_alignment": True}),
    Case("stage 2, no reduce-scatter, overlap", "bf16", 1, {"stage": 2, "reduce_scatter": False, "overlap_comm": True}),
    Case("stage 1, CPU offload", "bf16", 3, {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
    Case("stage 2, CPU offload", "fp32", 1, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
]


def _run_cases(rank: int, cases: list[Case]) -> list[dict]:
    return [check_case(case) for case in cases]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_equals_unsharded(world):
    by_rank = run_ranks(world, _run_cases, CASES)
    for index, case in enumerate(CASES):
        outcomes = [results[index] for results in by_rank]
        for name, value in outcomes[0]["weights"].items():
            assert all(torch.equal(value, other["weights"][name]) for other in outcomes), f"{case.name}: {name} differs"
        for outcome in outcomes:
            # DeepSpeedZeroOptimizer calls step once for each group, BF16_Optimizer once for all of them.
            assert outcome["collectives"] == (outcome["calls"] if world > 1 else 0), case.name
        groups = case.groups if outcomes[0]["wrapper"] == "DeepSpeedZeroOptimizer" else 1
        assert outcomes[0]["calls"] == 4 * groups
    if world == 4:
        assert any(any(result["empty"]) for results in by_rank for result in results), "no rank was without a fragment"
