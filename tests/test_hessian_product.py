# SPDX-License-Identifier: Apache-2.0
"""A loss's Hessian against whole Hessians and differences of gradients."""

import numpy as np
import pytest
import torch
from alone import megatron_alone
from torch.nn.functional import cross_entropy

from merit_ds.errors import UnsupportedError
from merit_ds.telemetry.hessian_product import HessianProduct
from merit_ds.telemetry.lanczos import lanczos, rademacher, spectral_density
from merit_ds.training.config import ModelConfig
from merit_ds.training.model import build_model

Batch = tuple[torch.Tensor, torch.Tensor]


class Network(torch.nn.Module):
    """67 trained weights, one of them tied, a frozen one that is not zero, and one that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))
        self.tied = self.first
        self.last = torch.nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
        self.frozen = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(inputs @ self.first.T + self.frozen)
        return torch.tanh(hidden @ self.tied) @ self.last.T


def network_loss(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(module(batch[0]), batch[1], reduction="sum") / 30


@pytest.fixture(scope="module")
def small() -> tuple[HessianProduct, torch.Tensor]:
    """The product, and the whole Hessian by torch's own functional of plain vectors."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (30,), generator=generator)
    module = Network()

    def of_a_vector(vector: torch.Tensor) -> torch.Tensor:
        first, last = vector[:36].view(6, 6), vector[36:60].view(4, 6)
        hidden = torch.tanh(torch.tanh(inputs @ first.T + module.frozen) @ first)
        return cross_entropy(hidden @ last.T, labels)

    weights = torch.cat([module.first.flatten(), module.last.flatten(), module.unused]).detach()
    whole = torch.autograd.functional.hessian(of_a_vector, weights)
    batches = [(inputs[:20], labels[:20]), (inputs[20:], labels[20:])]
    return HessianProduct(module, network_loss, batches), whole


def test_products_are_those_of_the_whole_hessian(small: tuple[HessianProduct, torch.Tensor]) -> None:
    product, whole = small
    assert product.size == 67
    columns = torch.stack([product(unit) for unit in torch.eye(67, dtype=torch.float64)])
    torch.testing.assert_close(columns, whole, rtol=1e-12, atol=1e-14)
    assert product.check() < 1e-3
    torch.testing.assert_close(product(whole[0]), whole @ whole[0], rtol=1e-12, atol=1e-14)  # its weights are as before


def test_the_spectrum_is_that_of_the_whole_hessian(small: tuple[HessianProduct, torch.Tensor]) -> None:
    product, whole = small
    values = np.linalg.eigvalsh(whole.numpy())
    generator = torch.Generator().manual_seed(3)
    signs = [rademacher(67, generator=generator).double() for _ in range(200)]
    found = [lanczos(product, vector, steps=20) for vector in signs[:20]]
    assert float(found[0].nodes[-1]) == pytest.approx(values[-1], rel=1e-8)
    assert float(found[0].nodes[0]) == pytest.approx(values[0], rel=1e-6)
    trace = torch.stack([vector @ product(vector) for vector in signs])
    assert abs(float(trace.mean()) - values.sum()) < 4 * float(trace.std()) / 200**0.5
    assert 67 * float(found[0].weights @ found[0].nodes) == pytest.approx(float(trace[0]), rel=1e-10)
    grid = torch.linspace(values[0] - 1, values[-1] + 1, 5001, dtype=torch.float64)
    density = spectral_density(found, grid, sigma=0.02) * float(grid[1] - grid[0])
    for low, high in ((-9.0, -0.05), (-0.05, 0.05), (0.05, 9.0)):
        share = ((values > low) & (values < high)).mean()
        assert float(density[(grid > low) & (grid < high)].sum()) == pytest.approx(share, abs=0.06)


def gpt() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    shape = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=12, vocab_multiple=32, init_std=0.3
    )
    model = build_model(shape, vocab_size=30, dtype=torch.float32, device="cpu", seed=1)
    drawn = torch.randint(0, 30, (4, 13), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).expand(2, -1)
    return model, [
        {"tokens": rows[:, :-1], "labels": rows[:, 1:], "position_ids": positions} for rows in drawn.split(2)
    ]


def gpt_loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = module(batch["tokens"], batch["position_ids"], None)
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / 48


def test_products_of_megatrons_gpt_are_finite_differences_of_its_gradients() -> None:
    """In float64, along a random direction: every layer takes part, LayerNorm's frozen bias does not."""
    with megatron_alone():
        model, batches = gpt()
        model = model.double()
        product = HessianProduct(model, gpt_loss, batches)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert product.size == sum(parameter.numel() for parameter in trained)
        generator = torch.Generator().manual_seed(4)
        direction = torch.randn(product.size, dtype=torch.float64, generator=generator)
        weights = torch.nn.utils.parameters_to_vector(trained).detach()
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(weights + sign * 1e-5 * direction, trained)
            loss = sum((gpt_loss(model, batch) for batch in batches), torch.zeros(()))
            ends.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)]))
        torch.nn.utils.vector_to_parameters(weights, trained)
        difference = (ends[0] - ends[1]) / 2e-5
        assert float((product(direction) - difference).norm() / difference.norm()) < 1e-7


def test_a_loss_without_a_second_derivative_is_refused() -> None:
    """Megatron-core's own loss: differentiated twice it gives numbers, and they are wrong."""

    def megatrons(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum() / 48
        return loss

    with megatron_alone():
        model, batches = gpt()
        assert HessianProduct(model, gpt_loss, batches).check() < 1e-3
        ours, theirs = HessianProduct(model, gpt_loss, batches), HessianProduct(model, megatrons, batches)
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-6)
        with pytest.raises(UnsupportedError, match="no second derivative"):
            theirs.check()
