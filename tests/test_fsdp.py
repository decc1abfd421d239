# SPDX-License-Identifier: Apache-2.0
"""Merit under PyTorch's fully_shard (FSDP2) on gloo ranks equals the unsharded reference bit for bit.

One process group of four ranks serves all cases; a case on fewer takes the first few of them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zero_cases import SETTINGS, STEPS, Recorder, Shapes, logical_matrices

from merit_ds import Merit, UnsupportedError
from merit_ds.reference import merit_step

WORLD = 4
MATRIX_VIEWS = {"stack": "stack", "convolution": "flatten"}


@dataclass(frozen=True)
class Case:
    """A mesh of ranks, the parameters' dtype, and what fully_shard is told."""

    name: str
    ranks: list
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    reshard: bool = True

    @property
    def options(self) -> dict[str, Any]:
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        return {"reshard_after_forward": self.reshard, "mp_policy": policy}


CASES = [
    Case("1 rank", [0]),
    Case("2 ranks", [0, 1]),
    Case("3 ranks", [0, 1, 2]),
    Case("4 ranks, weights stay after the forward pass", [0, 1, 2, 3], reshard=False),
    Case("2 x 2 ranks, replicated and sharded", [[0, 1], [2, 3]]),
    Case("3 ranks, bf16 computation", [0, 1, 2], compute_dtype=torch.bfloat16),
    Case("4 ranks, bf16 parameters", [0, 1, 2, 3], dtype=torch.bfloat16),
]


def on_mesh(ranks, function, *args):
    """Call `function(mesh, *args)` on the mesh's ranks; the others only take part in making it."""
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("outer", "inner")[-torch.tensor(ranks).dim() :])
    return function(mesh, *args) if mesh.get_coordinate() is not None else None


def sharded_model(mesh, *, seed=None, dtype=torch.float32, **options):
    """Shapes with a tied weight, sharded; fully_shard makes new parameters, so the views are set after it."""
    model = Shapes().to(dtype)
    model.empty.requires_grad_(False)  # fully_shard cannot reduce a gradient of no elements
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    model.tied = model.matrix
    fully_shard(model, mesh=mesh, **options)
    for name, view in MATRIX_VIEWS.items():
        getattr(model, name).matrix_view = view
    return model


def full(tensor):
    """The whole of a DTensor, in memory of its own."""
    return tensor.detach().full_tensor().clone()


def check_case(mesh, case):
    """After each of some steps weights and moments equal the reference's, given the reduced gradients.

    Returns:
        The number of all-reduces, and whether this rank holds nothing of some weight.
    """
    model = sharded_model(mesh, dtype=case.dtype, **case.options)
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in model.groups(2)]
    optimizer = Merit(groups, **SETTINGS)
    recorder = Recorder(optimizer)
    parameters = [(group, p) for group in groups for p in group["params"]]
    start = [full(p) for _, p in parameters]
    expected = [[weight.float().clone(), torch.zeros(weight.shape), torch.zeros(weight.shape)] for weight in start]
    for step in range(STEPS):
        model(step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        grads, recorder.grads = recorder.grads, []
        for (group, parameter), grad, (weight, *moments) in zip(parameters, grads, expected, strict=True):
            settings = SETTINGS | {"weight_decay": group.get("weight_decay", 0.1) if parameter.dim() > 1 else 0.0}
            whole = (weight, full(grad).float(), *moments)
            for pieces in zip(*(logical_matrices(parameter, t.view(-1)) for t in whole), strict=True):
                merit_step(*pieces, **settings)
            weight.copy_(weight.to(case.dtype))
            state = optimizer.state[parameter]
            for ours, wanted in zip(
                (parameter, state["exp_avg"], state["exp_avg_sq"]), (weight, *moments), strict=True
            ):
                assert torch.equal(full(ours).float(), wanted), f"{case.name}: {tuple(parameter.shape)}, step {step}"
            assert state["exp_avg"].dtype == torch.float32 and state["step"] == step + 1
    recorder.close()
    assert not any(torch.equal(full(p), old) for (_, p), old in zip(parameters, start, strict=True))
    held = [parameter.to_local().numel() for _, parameter in parameters]
    return recorder.collectives, 0 in held


def give_gradients(model, *, seed):
    """The same gradients on every mesh; none to a weight that is frozen, and to one none by odd seeds."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        draw = torch.Generator().manual_seed(100 * seed + index)
        grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        idle = not parameter.requires_grad or (name == "wide" and seed % 2)
        parameter.grad = None if idle else distribute_tensor(grad, parameter.device_mesh, parameter.placements)


def trained(mesh, *, steps, seed=None, dtype=torch.float32):
    """A model and its optimizer, frozen and missing gradients included."""
    model = sharded_model(mesh, seed=seed, dtype=dtype)
    optimizer = Merit(model.groups(2), **SETTINGS)
    for step in range(steps):
        give_gradients(model, seed=step)
        optimizer.step()
    return model, optimizer


def all_values(model, optimizer):
    moments = [full(state[name]) for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [full(parameter) for parameter in model.parameters()] + moments


def check_equal(first, second):
    first, second = all_values(*first), all_values(*second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_resume(mesh, dtype, options):
    """State goes through torch's own functions into a new optimizer of a new model; both go on alike."""
    old = trained(mesh, steps=2, dtype=dtype)
    assert [old[1].state[weight]["step"] for weight in (old[0].matrix, old[0].wide)] == [2, 1]
    states = copy.deepcopy((get_model_state_dict(old[0]), get_optimizer_state_dict(*old, options=options)))
    new = trained(mesh, steps=0, seed=9, dtype=dtype)
    set_model_state_dict(new[0], states[0])
    set_optimizer_state_dict(*new, states[1], options=options)
    assert all(state["exp_avg"].dtype == torch.float32 for state in new[1].state.values())
    for model, optimizer in (old, new):
        give_gradients(model, seed=2)
        optimizer.step()
    check_equal(old, new)


def save(mesh, folder):
    model, optimizer = trained(mesh, steps=2)
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(states, checkpoint_id=folder, process_group=mesh.get_group())


def check_resized(mesh, folder):
    """A checkpoint of two ranks goes on as if there had been three from the start."""
    model, optimizer = trained(mesh, steps=0, seed=9)
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(states, checkpoint_id=folder, process_group=mesh.get_group())
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    give_gradients(model, seed=2)
    optimizer.step()
    check_equal((model, optimizer), trained(mesh, steps=3))


def message(action, error=UnsupportedError):
    with pytest.raises(error) as refused:
        action()
    return str(refused.value)


def stepped(model, *, optimizer=None):
    optimizer = optimizer or Merit(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return optimizer


def before_fully_shard(mesh):
    """Refused, unless the new parameters are put in the old ones' place, as Accelerate does."""
    model = torch.nn.Linear(8, 8)
    optimizer = Merit(model.parameters(), lr=0.1)
    fully_shard(model, mesh=mesh)
    line = message(lambda: stepped(model, optimizer=optimizer))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = full(model.weight)
    stepped(model, optimizer=optimizer)
    assert not torch.equal(full(model.weight), before)
    return line


def foreign_shards(mesh):
    """A gradient, and a state, that do not lie on the ranks as the parameter does."""
    model = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    optimizer = stepped(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = full(saved["state"][0]["exp_avg"])
    model.weight.grad = distribute_tensor(torch.ones(8, 8), mesh, [Replicate()])
    return message(lambda: optimizer.load_state_dict(saved), ValueError), message(optimizer.step)


def one_rank_refuses(mesh):
    """Of four rows on two ranks the second must hold two, and holds one: neither may wait for the other for ever."""
    local = torch.ones(2 - mesh.get_local_rank(), 3)
    weight = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(4, 3), stride=(3, 1))
    weight = torch.nn.Parameter(weight)
    weight.grad = torch.ones_like(weight)
    return message(Merit([weight], lr=0.1).step)


def replicated(mesh):
    """A DTensor of which every rank has all is an ordinary weight."""
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    weight.grad = torch.ones_like(weight)
    Merit([weight], lr=0.1).step()
    twin = torch.nn.Parameter(torch.ones(4, 3))
    twin.grad = torch.ones(4, 3)
    Merit([twin], lr=0.1).step()
    assert torch.equal(full(weight), twin)


def refusals_of_two(mesh):
    by_columns = fully_shard(torch.nn.Linear(8, 8, bias=False), mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    flat = FullyShardedDataParallel(
        torch.nn.Linear(8, 8), process_group=mesh.get_group(), device_id=torch.device("cpu")
    )
    lines = message(lambda: stepped(by_columns)), message(lambda: stepped(flat)), before_fully_shard(mesh)
    return *lines, *foreign_shards(mesh), one_rank_refuses(mesh)


def tensor_parallel_refusal(mesh):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return message(lambda: stepped(fully_shard(model, mesh=mesh["outer"])))


def _all_cases(rank, folder):
    outcomes = [on_mesh(case.ranks, check_case, case) for case in CASES]
    on_mesh([0, 1, 2], check_resume, torch.bfloat16, StateDictOptions())
    on_mesh([0, 1], check_resume, torch.float32, StateDictOptions(full_state_dict=True))
    on_mesh([0, 1], save, folder)
    dist.barrier()
    on_mesh([0, 1, 2], check_resized, folder)
    on_mesh([0, 1], replicated)
    return outcomes, on_mesh([0, 1], refusals_of_two), on_mesh([[0, 1], [2, 3]], tensor_parallel_refusal)


def test_fully_shard_equals_unsharded_and_refuses_what_it_must(tmp_path):
    outcomes, refused, tensor_parallel = zip(*run_ranks(WORLD, _all_cases, str(tmp_path / "checkpoint")), strict=True)
    for case, by_rank in zip(CASES, zip(*outcomes, strict=True), strict=True):
        collectives = {outcome[0] for outcome in by_rank if outcome is not None}
        assert collectives == ({0} if len(case.ranks) == 1 else {STEPS}), f"{case.name}: one all-reduce a step"
    assert outcomes[-1][3][1], "the last of four ranks holds a part of every weight, so no empty part was tried"
    assert refused[0][:-1] == refused[1][:-1]
    columns, flat, early, state, gradient, one_rank = refused[0]
    assert "placements (Shard(dim=1),)" in columns and "without shard_placement_fn" in columns
    assert "_StridedShard" in tensor_parallel[0] and "without tensor parallelism" in tensor_parallel[0]
    assert "FullyShardedDataParallel: use fully_shard" in flat
    assert "constructed before fully_shard" in early
    assert "set_optimizer_state_dict" in state
    assert "gradient is not sharded as its parameter is" in gradient
    assert "another rank" in one_rank and "holds 1 elements" not in one_rank
    assert "holds 3 elements on a rank whose chunk has 6" in refused[1][-1]
