# SPDX-License-Identifier: Apache-2.0
"""The plan against real training steps of the real trainer: bytes on the wire to the byte, memory within 5 %."""

import json
from collections import Counter
from typing import Any

import launch
import pytest
from plan_cases import RECIPE, Case, measure_all
from ranks import run_ranks

from merit_ds.plan.forecast import Estimate, estimate, on_paper
from merit_ds.plan.gpus import GPUS
from merit_ds.plan.timing import Assumptions, Cluster

BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 2}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ONE, TWO = {"stage": 1}, {"stage": 2}
PAIR = {"tensor_parallel": 2}
LLAMA = {"norm": "rmsnorm", "qk_norm": True, "activation": "swiglu", "positions": "rotary", "tied_embeddings": False}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.001} | params}}


CASES = [
    Case("stage0"),
    Case("stage0_bf16", BF16),
    Case("stage0_fp16", FP16),
    Case("stage0_unclipped", {"gradient_clipping": 0.0}),
    Case("recipe", BF16 | SUMS, ONE),
    Case("recipe_padded", BF16 | SUMS, ONE, {"hidden_size": 44}),
    Case("recipe_fp32_wire", BF16 | SUMS | {"communication_data_type": "fp32"}, ONE),
    Case("recipe_adamw", BF16 | SUMS | optimizer("AdamW", torch_adam=True), ONE),
    Case("zero1_fp32", {}, ONE),
    Case("zero1_bf16", BF16, ONE),
    Case("zero1_fp16_sums", FP16 | SUMS, ONE),
    Case("zero1_lamb", BF16 | optimizer("MeritLAMB"), ONE),
    Case("zero2_fp32", {}, TWO),
    Case("zero2_bf16", BF16, TWO),
    Case("zero2_padded", BF16, TWO, {"hidden_size": 44}),
    Case("zero2_bf16_unchecked", {"bf16": {"enabled": True, "check_grad_overflow": False}}, TWO),
    Case("zero2_bf16_sums", BF16 | SUMS, TWO),
    Case("zero2_fp16", FP16, TWO),
    Case("zero2_lion", BF16 | optimizer("MeritLion"), TWO),
    Case("zero2_to_owner", BF16, TWO | {"use_multi_rank_bucket_allreduce": False}),
    Case("zero2_without_scatter", BF16, TWO | {"reduce_scatter": False}),
    Case("zero2_overlap", BF16, TWO | {"overlap_comm": True}),
    Case("zero1_overlap", {}, ONE | {"overlap_comm": True}),
    Case("zero2_one_micro_batch", BF16 | {"train_micro_batch_size_per_gpu": 8}, TWO),
    Case("zero2_adamw", BF16 | optimizer("AdamW", torch_adam=True), TWO),
    Case("recipe_muon", BF16 | SUMS | optimizer("Muon", torch_adam=True), ONE),
    Case("stage0_muon", optimizer("Muon", torch_adam=True)),
    Case("zero2_scion", BF16 | optimizer("MeritScion"), TWO),
    Case("pair_stage0", {}, model=PAIR),
    Case("pair_recipe", BF16 | SUMS, ONE, PAIR),
    Case("pair_zero2", BF16, TWO, PAIR | {"sequence_parallel": True}),
    Case("pair_llama", BF16, ONE, PAIR | LLAMA),
    Case("pair_llama_lamb", BF16 | optimizer("MeritLAMB"), ONE, PAIR | LLAMA),
    Case("pair_recomputed", {}, TWO, PAIR | {"activation_checkpointing": True}),
]


# Optimizers of plain torch operations have temporary tensors in their step, which are not planned.
TEMPORARIES = {"zero1_lamb", "pair_llama_lamb", "zero2_adamw", "recipe_muon", "stage0_muon", "zero2_scion"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    launch.prepare_text(path)
    (path / "recipe.yaml").write_text(RECIPE)
    for case in CASES:
        (path / f"{case.name}.json").write_text(json.dumps(case.ds_config()))
    return path


@pytest.fixture(scope="module")
def measured(folder):
    found = {}
    for ranks in sorted({case.ranks for case in CASES}):
        cases = [case for case in CASES if case.ranks == ranks]
        by_rank = run_ranks(ranks, measure_all, cases, folder, timeout=500)
        found |= {case.name: [rank[case.name] for rank in by_rank] for case in cases}
    return found


def planned(case: Case, folder) -> Estimate:
    config, ds_config = case.config(folder), case.ds_config()
    gpu = GPUS["h100-80g"]
    cluster = Cluster(gpu, 1, case.ranks, gpu.network)
    with on_paper(config, ds_config) as paper:
        micro_batch = ds_config["train_micro_batch_size_per_gpu"]
        return estimate(paper, ds_config, cluster, Assumptions(), micro_batch=micro_batch)


def span(ranks: tuple[int, ...], case: Case) -> str:
    if len(ranks) == case.ranks:
        return "all"
    return "tensor" if ranks[1] - ranks[0] == 1 else "data"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bytes_handed_to_collectives_are_those_of_a_real_step(case, measured, folder):
    found: Counter[tuple[str, str, str]] = Counter()
    for (collective, ranks), (size, calls) in measured[case.name][0].sent.items():
        if collective == "all-to-all":  # the one collective to which ranks hand in different sizes
            size = max(rank.sent[collective, ranks][0] for rank in measured[case.name])
        found[collective, span(ranks, case), "bytes"] += size
        found[collective, span(ranks, case), "calls"] += calls
    wanted: Counter[tuple[str, str, str]] = Counter()
    for transfer in planned(case, folder).transfers:
        # Without tensor parallelism the data-parallel ranks are all ranks.
        among = "all" if transfer.ranks == case.ranks else transfer.scope
        wanted[transfer.collective, among, "bytes"] += transfer.handed_bytes
        wanted[transfer.collective, among, "calls"] += transfer.calls
    if case.name == "zero2_to_owner":
        assert found.pop(("reduce", "all", "calls")) >= wanted.pop(("reduce", "all", "calls"))
    assert found == wanted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_is_that_of_a_real_step(case, measured, folder):
    memory = planned(case, folder).memory
    fullest = max(measured[case.name], key=lambda one: one.peak)
    assert memory.parameters == fullest.parameters
    assert memory.optimizer == max(rank.optimizer for rank in measured[case.name])
    rest = fullest.peak - fullest.parameters - fullest.optimizer
    if case.name not in TEMPORARIES:
        assert memory.gradients + memory.activations + memory.buffers == pytest.approx(rest, rel=0.05)
