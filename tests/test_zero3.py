# SPDX-License-Identifier: Apache-2.0
"""Merit under real DeepSpeed ZeRO-3 on gloo ranks: equal to the unsharded reference bit for bit, saved, refused."""

import copy

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from ranks import run_ranks
from zero3_cases import check_case, engine_of, micro_steps, whole
from zero_cases import STEPS, Case

from merit_ds import Merit, UnsupportedError
from merit_ds.layout import Matrix, ShardLayout

SMALL = {"stage": 3, "sub_group_size": 150}
CPU = {"device": "cpu"}
ACCUMULATION = {"gradient_accumulation_steps": 3}
CASES = [
    (Case("fp32", zero={"stage": 3}), False),
    (Case("fp32, zero.Init", groups=2, zero={"stage": 3}), True),
    (Case("bf16", "bf16", 3, SMALL), False),
    (Case("bf16, zero.Init, accumulation 3", "bf16", 3, SMALL, ACCUMULATION), True),
    (Case("bf16, nothing persists", "bf16", 2, SMALL | {"stage3_param_persistence_threshold": 0}), False),
    (
        Case("bf16, no reduce-scatter, overlap", "bf16", 2, SMALL | {"reduce_scatter": False, "overlap_comm": True}),
        False,
    ),
    (Case("bf16, optimizer offload", "bf16", 3, SMALL | {"offload_optimizer": CPU}), True),
    (Case("both offloads", "bf16", 1, SMALL | {"offload_optimizer": CPU, "offload_param": CPU}, ACCUMULATION), False),
    (Case("bf16, fp32 accumulation", "bf16", 2, SMALL, {"data_types": {"grad_accum_dtype": "fp32"}}), False),
]
LAST_CASES = [  # what they set lasts as long as the process
    (Case("hpZ", "bf16", 2, SMALL | {"zero_hpz_partition_size": 2}), False),
    (
        Case("bf16 autocast", groups=2, zero=SMALL, extra={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        False,
    ),
]


def _run_cases(rank, cases, folder):
    outcomes = [check_case(case, init=init) for case, init in cases]
    if folder is not None:
        _save_and_load(folder)
    return outcomes


def _save_and_load(folder):
    """After a checkpoint the next step is bitwise the same in another engine; its weights can be taken out of it."""
    case = Case("checkpoint", "bf16", 3, SMALL)
    first = engine_of(case, init=False)
    micro_steps(first, 0)
    micro_steps(first, 1)
    first.save_checkpoint(folder, tag="saved")
    dist.barrier()
    saved = get_fp32_state_dict_from_zero_checkpoint(folder, tag="saved")
    wrapper = first.optimizer
    for members, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        for parameter, weight in zip(members, whole(members, flat), strict=True):
            assert torch.equal(saved[wrapper.param_names[parameter]].view(-1), weight)
    second = engine_of(case, init=True)
    micro_steps(second, 5)
    assert second.load_checkpoint(folder, tag="saved")[0] is not None
    micro_steps(first, 2)
    micro_steps(second, 2)
    expected, found = tensors(first), tensors(second)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def tensors(engine):
    """The float32 weights, without ZeRO's padding, which holds anything, and this rank's moments and counts."""
    found, wrapper = {}, engine.optimizer
    for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        state = wrapper.optimizer.state[flat]
        found |= {f"{number}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
        found[f"{number}.weights"] = torch.cat(list(whole(wrapper.fp16_groups[number], flat)))
    return found


@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.full), 2, 3, pytest.param(4, marks=pytest.mark.full)]
)
def test_sharded_equals_unsharded(world, tmp_path):
    cases = CASES + LAST_CASES[world % 2 :]  # hpZ needs an even number of ranks
    by_rank = run_ranks(world, _run_cases, cases, str(tmp_path) if world == 2 else None)
    for index, (case, _) in enumerate(cases):
        outcomes = [results[index] for results in by_rank]
        for name, value in outcomes[0]["weights"].items():
            assert all(torch.equal(value, other["weights"][name]) for other in outcomes), f"{case.name}: {name} differs"
        for outcome in outcomes:
            assert outcome["calls"] == STEPS * outcome["sub_groups"], case.name
            assert outcome["collectives"] == (outcome["calls"] if world > 1 else 0), case.name
        if "sub_group_size" in case.zero:
            assert outcomes[0]["sub_groups"] > case.groups, f"{case.name}: no group had several"


def message(action):
    with pytest.raises(UnsupportedError) as refused:
        action()
    return str(refused.value)


def stepped_alone(optimizer, flat):
    """Merit's answer to a sub-group, as DeepSpeed hands it over."""
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    return message(optimizer.step)


def _refusals(rank):
    case = Case("refused", "bf16", zero=SMALL)
    lines = {}
    engine = engine_of(case, init=False)
    flats = engine.optimizer.fp32_partitioned_groups_flat
    if rank == 1:
        flats[-1].data += 1
    before = flats[-1].detach().clone()
    lines["values"] = message(lambda: micro_steps(engine, 0))
    assert torch.equal(flats[-1].detach(), before)

    engine = engine_of(case, init=False)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters(recurse=False)), modifier_rank=0):
        engine.module.wide.data += 1
    engine.optimizer.refresh_fp32_params()
    micro_steps(engine, 0)

    engine = engine_of(case, init=False)
    merit, flat = engine.optimizer.optimizer, engine.optimizer.fp32_partitioned_groups_flat[0]
    lines["copy"] = stepped_alone(copy.deepcopy(merit), flat)
    lines["unknown"] = stepped_alone(merit, torch.nn.Parameter(torch.ones(5)))
    for name in ("zenflow", "swap_optimizer", "params_in_nvme_and_cpu"):  # need CUDA or a disk with libaio
        setattr(engine.optimizer, name, True)
        lines[name] = stepped_alone(merit, flat)
        setattr(engine.optimizer, name, False)
    with deepspeed.zero.Init(config_dict_or_path=case.config(1)):
        model = torch.nn.Linear(8, 8)
    lines["no engine"] = message(Merit(model.parameters(), lr=0.1).step)

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    lines["tensor parallel"] = message(lambda: micro_steps(engine_of(case, init=False), 0))
    return lines


def test_refusals():
    first, second = run_ranks(2, _refusals)
    assert "another rank" in first.pop("values")
    assert "refresh_fp32_params" in second.pop("values")
    assert first == second
    words = {
        "copy": "a wrapper has changed",
        "unknown": "sub-groups",
        "zenflow": "zero_optimization.zenflow",
        "swap_optimizer": "zero_optimization.offload_optimizer.device nvme",
        "params_in_nvme_and_cpu": "zero_optimization.offload_param.device nvme",
        "no engine": "zero_optimization.stage",
        "tensor parallel": "zero_optimization.stage 3",
    }
    for name, line in first.items():
        assert words[name] in line and "\n" not in line, line


@st.composite
def sub_groups(draw):
    """The matrices of some parameters, each by itself from position 0 on, and a number of ranks."""
    parameters = []
    for _ in range(draw(st.integers(1, 5))):
        rows, cols, count = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
        split = draw(st.sampled_from([None, "rows", "cols"]))
        is_vector = draw(st.booleans())
        shape = (1, rows * cols) if is_vector else (rows, cols)
        starts = range(0, count * rows * cols, rows * cols)
        parameters.append([Matrix(start, *shape, is_vector=is_vector, split=split) for start in starts])
    return parameters, draw(st.integers(1, 6))


def slots(fragment):
    """Each slot of the data-parallel exchange that a cut fragment uses, with the maximum that it is for."""
    shared, first_row = fragment.shared, fragment.first // fragment.matrix.cols
    yield shared.whole, "whole"
    if shared.cols is not None:
        yield from ((shared.cols + col, f"column {col}") for col in range(fragment.matrix.cols))
    for row, slot in ((first_row, shared.first_row), (first_row + fragment.rows - 1, shared.last_row)):
        if slot is not None:
            yield slot, f"row {row}"


@settings(max_examples=200, deadline=None)
@given(sub_groups())
def test_concatenated_layouts(drawn):
    """Every element is in one fragment once; a slot is for one maximum only, the same on every rank."""
    parameters, world = drawn
    sizes = [-(-matrices[-1].stop // world) for matrices in parameters]
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    meanings = set()
    for rank in range(world):
        layouts = [
            ShardLayout.build(matrices, bounds=[part * size for part in range(world + 1)], rank=rank)
            for matrices, size in zip(parameters, sizes, strict=True)
        ]
        layout = ShardLayout.concatenate(layouts, offsets=offsets)
        fragments = (*layout.cut, *layout.whole)
        pieces = [piece for fragment in fragments for piece in fragment.rectangles()]
        held = [position for p in pieces for position in range(p.offset, p.offset + p.rows * p.cols)]
        assert sorted(held) == [
            offset + index
            for matrices, size, offset in zip(parameters, sizes, offsets, strict=True)
            for index in range(min(size, matrices[-1].stop - rank * size))
        ]
        numbers = [number for number, single in enumerate(layouts) for _ in single.cut]
        for number, fragment in zip(numbers, layout.cut, strict=True):
            meanings |= {(slot, (number, fragment.matrix.start, use)) for slot, use in slots(fragment)}
        split = [fragment for fragment in fragments if fragment.tensor_slot is not None]
        taken = [slot for f in split for slot in range(f.tensor_slot, f.tensor_slot + f.tensor_slots)]
        assert sorted(taken) == list(range(1, layout.tensor_exchange_size))
    assert sorted(slot for slot, _ in meanings) == list(range(1, layout.exchange_size))
    assert len({meaning for _, meaning in meanings}) == len(meanings)
