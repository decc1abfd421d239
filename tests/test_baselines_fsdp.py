# SPDX-License-Identifier: Apache-2.0
"""The baselines under PyTorch's fully_shard on gloo ranks, against the same optimizers over whole parameters."""

import pytest
import torch
from baseline_cases import EXACT, ROUNDED, NonEmptyShapes, kind_of, options
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from merit_ds import MeritSophiaG, UnsupportedError

STEPS = 3
MESHES = {"sharded": (4,), "replicated and sharded": (2, 2)}


def marked(model, like):
    """fully_shard makes new parameters, without the attributes."""
    for name, parameter in like.named_parameters():
        for mark in ("matrix_view", "sign_update"):
            if hasattr(parameter, mark):
                setattr(model.get_parameter(name), mark, getattr(parameter, mark))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_case(mesh, name):
    plain, model = NonEmptyShapes(), NonEmptyShapes()
    fully_shard(model, mesh=mesh)
    parameters, copies = marked(model, like=plain), marked(plain, like=plain)
    optimizer, alone = (kind_of(name)(each, **options(name)) for each in (parameters, copies))
    for step in range(STEPS):
        for index, (parameter, copy) in enumerate(zip(parameters, copies, strict=True)):
            copy.grad = torch.randn(copy.shape, generator=torch.Generator().manual_seed(100 * step + index))
            parameter.grad = distribute_tensor(copy.grad.clone(), parameter.device_mesh, parameter.placements)
        if name == "MeritSophiaG" and step % 2 == 0:
            for each in (optimizer, alone):
                each.update_hessian([copy.grad.flip(0) for copy in copies], examples=10)
        optimizer.step()
        alone.step()
        for parameter, copy in zip(parameters, copies, strict=True):
            ours = parameter.detach().full_tensor()
            if name in EXACT:
                assert torch.equal(ours, copy), f"step {step}, {tuple(copy.shape)}"
            else:
                torch.testing.assert_close(ours, copy.detach(), rtol=1e-6, atol=1e-7)
    assert not any(map(torch.equal, copies, marked(NonEmptyShapes(), like=plain)))


def _check_all(rank):
    for kind, shape in MESHES.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])
        for name in EXACT | ROUNDED:
            try:
                check_case(mesh, name)
            except BaseException as error:
                error.add_note(f"{name}, {kind}")
                raise


def test_every_baseline_is_right_under_fully_shard():
    run_ranks(4, _check_all)


def _step_without_an_estimate(rank):
    plain, model = (torch.nn.Linear(4, 1) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer, alone = MeritSophiaG(model.parameters(), 0.01), MeritSophiaG(plain.parameters(), 0.01)
    for parameter, copy in zip(model.parameters(), plain.parameters(), strict=True):
        copy.grad = torch.ones_like(copy)
        parameter.grad = distribute_tensor(copy.grad.clone(), parameter.device_mesh, parameter.placements)
    with pytest.raises(UnsupportedError) as refusal:
        optimizer.step()
    for each in (optimizer, alone):
        each.update_hessian([torch.ones_like(copy) for copy in plain.parameters()], examples=10)
        each.step()
    for parameter, copy in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.detach().full_tensor(), copy)
    return str(refusal.value)


def test_a_missing_estimate_is_refused_on_the_ranks_that_hold_no_gradient_too():
    """A weight of one row lies on rank 0 alone: rank 1 waited for it in the exchange of the step."""
    first, second = run_ranks(2, _step_without_an_estimate)
    assert "no estimate of the Hessian yet" in first and "another rank refuses the step" in second
