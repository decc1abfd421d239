# SPDX-License-Identifier: Apache-2.0
"""The whole sharded step against a numpy oracle, for random weights, views, tensor-parallel splits and partitions.

All ranks live in this process. What they hold, hand in and take back is the package's own code; only the two
all-reduces are a maximum over the ranks' buffers here. Real process groups: tests/test_collectives.py and others.
"""

from dataclasses import dataclass
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import GROUP, numpy_step

import merit_ds.megatron
from merit_ds.baselines.lamb import LambRule
from merit_ds.baselines.lars import LarsRule
from merit_ds.baselines.lion import LionRule
from merit_ds.baselines.sophia import SophiaRule
from merit_ds.layout import ShardLayout
from merit_ds.ops import select_kernel
from merit_ds.ops.merit_rule import MeritRule
from merit_ds.ops.rule import L2, MAX
from merit_ds.ops.table import Operands
from merit_ds.shard import Shard, logical_matrices
from merit_ds.step import Stepper

SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, inf, -inf, nan)
BASELINE = GROUP | {"step": 3, "bias_correction": True, "momentum": 0.9, "trust_coefficient": 0.1, "gamma": 0.5}
SETTINGS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6}


@dataclass(frozen=True)
class Weight:
    """A parameter before it is split over `tensor_parallel` ranks along `axis`."""

    shape: tuple[int, ...]
    view: object = None
    axis: int | None = None
    decayed: bool = True
    scaled: bool = True

    def parts(self, array: np.ndarray, tensor_parallel: int) -> list[np.ndarray]:
        return [array] * tensor_parallel if self.axis is None else np.split(array, tensor_parallel, self.axis)

    def matrices(self, array: np.ndarray) -> list[np.ndarray]:
        """What MERIT sees, from an array of the whole shape."""
        if self.view == "stack":
            return list(array)
        if self.view == "flatten":
            return [array.reshape(len(array), -1)]
        if self.view is None:
            return [array]
        _, query, head = self.view
        groups = array.reshape(-1, query + 2 * head, array.shape[1])
        parts = np.split(groups, [query, query + head], axis=1)
        return [part.reshape(-1, array.shape[1]) for part in parts]

    def parameter(self, part: np.ndarray) -> torch.Tensor:
        """What a rank's model has, with the attributes that say what it is."""
        parameter = torch.empty(part.shape)
        parameter.matrix_view = self.view
        parameter.no_weight_decay, parameter.no_trust_ratio = not self.decayed, not self.scaled
        parameter.tensor_model_parallel, parameter.partition_dim = self.axis is not None, self.axis
        return parameter


@st.composite
def weights(draw, tensor_parallel):
    kind = draw(st.sampled_from(["vector", "matrix", "matrix", "stack", "flatten", "qkv"]))
    marks = {"decayed": draw(st.integers(0, 4)) > 0, "scaled": draw(st.integers(0, 4)) > 0}
    size = st.integers(1, 5)
    if kind == "vector":
        axis = draw(st.sampled_from([None, 0]))
        return Weight((draw(size) * (1 if axis is None else tensor_parallel),), axis=axis, **marks)
    if kind == "matrix":
        axis = draw(st.sampled_from([None, 0, 1]))
        shape = [draw(size) * (tensor_parallel if each == axis else 1) for each in (0, 1)]
        return Weight(tuple(shape), axis=axis, **marks)
    if kind == "qkv":
        axis = draw(st.sampled_from([None, 0]))
        query, head = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        groups = draw(st.integers(1, 2)) * (1 if axis is None else tensor_parallel)
        return Weight((groups * (query + 2 * head), draw(size)), ("qkv", query, head), axis, **marks)
    shape = tuple(draw(st.integers(1, 3)) for _ in range(3))
    return Weight(shape, kind, **marks)


@st.composite
def jobs(draw):
    """Weights, the tensor-parallel ranks that split them, where data-parallel ranks cut each one's buffer, values."""
    tensor_parallel = draw(st.sampled_from([1, 1, 2, 4]))
    found = draw(st.lists(weights(tensor_parallel), min_size=1, max_size=4))
    length = sum(weight.parts(np.zeros(weight.shape), tensor_parallel)[0].size for weight in found)
    inner = draw(st.lists(st.integers(0, length), max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    total = sum(int(np.prod(weight.shape)) for weight in found)
    values = random.standard_normal((4, total)).astype(np.float32)
    values[3] = np.abs(values[3])
    for _ in range(draw(st.integers(0, 4))):
        values[random.integers(3), random.integers(total)] = SPECIAL[random.integers(len(SPECIAL))]
    if draw(st.integers(0, 5)) == 0:
        values[:, : total // 2] = 0
    return found, tensor_parallel, [0, *sorted(inner), length], values


def expected_of(found, values):
    """The oracle's weights and moments, [3, total]."""
    result = values[[0, 2, 3]].copy()
    begin = 0
    for weight in found:
        places = np.arange(begin, begin + int(np.prod(weight.shape))).reshape(weight.shape)
        begin += places.size
        for ids in weight.matrices(places):
            vector = ids.ndim == 1
            decay = 0.1 if weight.decayed and not vector else 0.0
            stepped = numpy_step(*values[:, ids], **SETTINGS, weight_decay=decay, scaled=weight.scaled)
            for row, part in zip(result, stepped, strict=True):
                row[ids] = part
    return result


class Rank:
    """One rank's step, stopped at its exchanges."""

    def __init__(self, matrices, ids, values, bounds, index, kernel, settings):
        self.ids = ids[bounds[index] : bounds[index + 1]]
        self.slices = [torch.from_numpy(part[self.ids]) for part in values]
        layout = ShardLayout.build(matrices, bounds=bounds, rank=index)
        groups = {"group": "data", "tensor_group": "tensor"}
        shard = Shard(self.slices[0], layout, tuple(matrices), wrapper="none", **groups)
        self.kernel = kernel
        self.stepper = Stepper([shard], groups=[0], kernel=kernel, device=torch.device("cpu"))
        self.plan, self.maxima = self.stepper.plan, self.stepper.maxima
        self.scalars = torch.tensor(kernel.rule.scalars(settings))

    def run(self, operation, tiles):
        """One operation over one phase's rectangles."""
        if tiles:
            cpu = torch.device("cpu")
            prepare = self.kernel.preparer([self.slices[0].numel()], cpu)
            table = self.kernel.table(tiles, cpu)
            operands = prepare(Operands(*([part] for part in self.slices[: 2 + len(self.kernel.rule.moments)])))
            getattr(self.kernel, operation)(operands, tiles=table, scalars=self.scalars, maxima=self.maxima)


def reduce(ranks, regions):
    """The exchange of one process group, MAX or the sum, over the region that each of its ranks has for it."""
    parts = [rank.maxima[region.begin : region.end] for rank, (region,) in zip(ranks, regions, strict=True)]
    if parts[0].dtype == torch.float64:
        total = torch.stack(parts).sum(0)
        for part in parts:
            part.copy_(total)
        return
    bits = torch.stack([part.view(torch.int32) & 0x7FFFFFFF for part in parts]).amax(0)
    for part in parts:
        part.view(torch.int32).copy_(bits)


def buffer(found, tensor_parallel, index, group):
    """One tensor-parallel rank's logical matrices, and for each element of its flat buffer its place in the whole."""
    matrices, ids, begin, start = [], [], 0, 0
    for weight in found:
        places = np.arange(begin, begin + int(np.prod(weight.shape))).reshape(weight.shape)
        begin += places.size
        part = weight.parts(places, tensor_parallel)[index]
        matrices += logical_matrices(weight.parameter(part), group, start=start)
        start += part.size
        ids.append(part.ravel())
    return matrices, np.concatenate(ids)


def stepped(found, tensor_parallel, bounds, values, kernel, group=GROUP):
    """Weights and moments after the ranks' step, [3, total]; every element was written by some rank."""
    columns = []
    for index in range(tensor_parallel):
        matrices, ids = buffer(found, tensor_parallel, index, group)
        columns.append([Rank(matrices, ids, values, bounds, each, kernel, group) for each in range(len(bounds) - 1)])
    ranks = [rank for column in columns for rank in column]
    for rank in ranks:
        rank.stepper.clear()
        rank.run("accumulate", rank.plan.cut)
        rank.run("accumulate", rank.plan.split)
    for column in columns:
        reduce(column, [rank.plan.data for rank in column])
    for rank in ranks:
        rank.stepper.carry_over()
    for peers in zip(*columns, strict=True):
        reduce(peers, [rank.plan.tensor for rank in peers])
    result = np.full((3, values.shape[1]), np.float32(-7))
    for rank in ranks:
        rank.run("step", rank.plan.alone)
        rank.stepper.carry_back()
        rank.run("apply", rank.plan.cut)
        rank.run("apply", rank.plan.split)
        ours, there = np.stack([rank.slices[part].numpy() for part in (0, 2, 3)]), result[:, rank.ids]
        fits = (there == -7) | (there == ours) | (np.isnan(there) & np.isnan(ours))
        assert fits.all(), "copies of a replicated weight have come apart"
        result[:, rank.ids] = ours
    return result


def check(job, kernel):
    found, tensor_parallel, bounds, values = job
    ours, expected = stepped(found, tensor_parallel, bounds, values, kernel), expected_of(found, values)
    same = (ours.view(np.int32) == expected.view(np.int32)) | (np.isnan(ours) & np.isnan(expected))
    assert same.all(), f"{np.argwhere(~same)[:5].tolist()}: {ours[~same][:5]} is not {expected[~same][:5]}"


@pytest.fixture(autouse=True)
def tensor_parallel_ranks(monkeypatch):
    """Some group, so that the parameters' attributes count; nothing talks over it here."""
    monkeypatch.setattr(merit_ds.megatron, "tensor_parallel_group", object)


@pytest.fixture(params=["eager", "fused", "emulated CUDA"])
def kernel(request):
    if request.param == "emulated CUDA":
        return request.getfixturevalue("emulated_cuda")
    return select_kernel(torch.device("cpu"), fused=request.param == "fused")


def test_sharded_step_is_the_unsharded_one(kernel):
    @settings(max_examples=150, deadline=None)
    @given(jobs())
    def holds(job):
        check(job, kernel)

    holds()


RULES = {
    "whole-weight ratio alone": (MeritRule(MAX), {"elementwise": False}),
    "without the whole-weight bound": (MeritRule(MAX), {"whole_bound": False}),
    "l2 norms": (MeritRule(L2), {}),
    "LAMB": (LambRule(L2), {"elementwise": False}),
    "maxLAMB": (LambRule(MAX), {"elementwise": False}),
    "LARS": (LarsRule(), {"elementwise": False}),
    "Lion": (LionRule(), {"no_trust_ratio": True}),
    "Sophia-G": (SophiaRule(), {"no_trust_ratio": True}),
}


@pytest.mark.parametrize("name", RULES)
def test_baselines_sharded_are_the_unsharded_ones(name):
    """Bitwise, but for sums, whose float64 rounding may move a ratio by one unit of float32."""
    rule, marks = RULES[name]
    kernel = select_kernel(torch.device("cpu"), rule=rule, fused=False)

    @settings(max_examples=60, deadline=None)
    @given(jobs())
    def holds(job):
        found, tensor_parallel, bounds, values = job
        ours = stepped(found, tensor_parallel, bounds, values, kernel, BASELINE | marks)
        alone = stepped(found, 1, [0, values.shape[1]], values, kernel, BASELINE | marks)
        tolerance = 2e-6 if rule.norm == L2 else 0
        np.testing.assert_allclose(ours, alone, rtol=tolerance, atol=tolerance)

    holds()


@pytest.mark.full
def test_sharded_step_is_the_unsharded_one_thousands(kernel):
    @settings(max_examples=5000, deadline=None)
    @given(jobs())
    def holds(job):
        check(job, kernel)

    holds()
