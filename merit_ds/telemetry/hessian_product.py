# SPDX-License-Identifier: Apache-2.0
"""Products of a loss's Hessian with vectors, by differentiating twice, a micro-batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from merit_ds.errors import InputError, UnsupportedError

_STEPS = (1e-1, 1e-2, 1e-3)
"""Lengths of the finite differences, in shares of the weights' length over the root of their number."""
_TOLERANCE = 0.05
"""Float32 differences agree to 0.01 % or so; a term of the Hessian that is left out changes much more than this."""


class HessianProduct:
    """H of a sum of losses, with respect to the parameters that are trained; a tied weight counts once.

    A vector [n] holds the entries of all trained parameters, in the order of `module.parameters()`. Memory: one
    micro-batch's graph of the first backward pass, and a few vectors.

    Args:
        module: all of its trained parameters are of one dtype, and on one device.
        loss: maps `module` and one of `batches` to its share of the loss, which is the sum over all of them.
        batches: all in memory.

    Raises:
        InputError: the loss or its gradient is not finite.
    """

    def __init__(
        self, module: torch.nn.Module, loss: Callable[[torch.nn.Module, Any], torch.Tensor], batches: Sequence[Any]
    ) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._module = module
        self._loss = loss
        self._batches = batches
        self.size = sum(parameter.numel() for parameter in self._parameters)
        self.device = self._parameters[0].device
        self.loss, self.gradient = self._first_order(batches)
        if not self.gradient.isfinite().all():
            raise InputError(f"the loss is {self.loss} and its gradient is not finite: take an earlier checkpoint")

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Hv for v [n]; both in the dtype of the parameters."""
        return self._second_order(vector, self._batches)

    def check(self) -> float:
        """Compare the product with the gradient's finite differences, along the gradient, in the first micro-batch.

        An operation whose backward pass cannot be differentiated may well return a wrong number instead of an error.

        Returns:
            The relative difference.

        Raises:
            UnsupportedError: they disagree.
        """
        first = self._batches[:1]
        weights = [parameter.detach().clone() for parameter in self._parameters]
        scale = float(_flatten(weights).norm()) / self.size**0.5
        direction = self.gradient / self.gradient.norm()
        product = self._second_order(direction, first)
        differences = []
        for step in _STEPS:
            ends = []
            for sign in (1, -1):
                self._set(weights, direction * (sign * step * scale))
                ends.append(self._first_order(first)[1])
            difference = (ends[0] - ends[1]) / (2 * step * scale)
            differences.append(float((difference - product).norm() / product.norm()))
        self._set(weights, torch.zeros_like(direction))
        if not min(differences) < _TOLERANCE:
            raise UnsupportedError(
                f"the Hessian's product is {min(differences):.0%} off the gradient's finite difference: an operation "
                "of this model has no second derivative"
            )
        return min(differences)

    def _first_order(self, batches: Sequence[Any]) -> tuple[float, torch.Tensor]:
        total, gradient = 0.0, torch.zeros(self.size, dtype=self._parameters[0].dtype, device=self.device)
        for batch in batches:
            loss = self._loss(self._module, batch)
            gradient += _flatten(torch.autograd.grad(loss, self._parameters, materialize_grads=True))
            total += loss.item()
        return total, gradient

    def _second_order(self, vector: torch.Tensor, batches: Sequence[Any]) -> torch.Tensor:
        parts = self._like_parameters(vector)
        product = torch.zeros_like(vector)
        # Its fused kernels have a first derivative only.
        with sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                gradients = torch.autograd.grad(
                    self._loss(self._module, batch), self._parameters, create_graph=True, materialize_grads=True
                )
                # A gradient that no weight influences, an unused parameter's for instance, has no derivative to take.
                varying = [(grad, part) for grad, part in zip(gradients, parts, strict=True) if grad.requires_grad]
                if varying:
                    outputs, directions = zip(*varying, strict=True)
                    rows = torch.autograd.grad(outputs, self._parameters, directions, materialize_grads=True)
                    product += _flatten(rows)
        return product

    def _like_parameters(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    @torch.no_grad()
    def _set(self, weights: list[torch.Tensor], change: torch.Tensor) -> None:
        for parameter, weight, part in zip(self._parameters, weights, self._like_parameters(change), strict=True):
            parameter.copy_(weight + part)


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
