# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ways in share: a witness of Merit's steps inside an engine, and of what it logs."""

import logging
from typing import Any

import torch
from torch import Tensor
from zero_cases import buffer_order, flat_partitions, gather, logical_matrices, offsets

from merit_ds import Merit
from merit_ds.reference import merit_step

SETTINGS = {"lr": 0.02, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}


class Witness:
    """Holds every step of the Merit in a ZeRO engine against the unsharded reference, bit for bit.

    The replay gets the gradients and the settings that Merit is called with, so a framework's schedule and clipping
    may do as they like.
    """

    def __init__(self, wrapper: Any) -> None:
        """Args: `wrapper`, the ZeRO optimizer, `engine.optimizer`."""
        merit = wrapper.optimizer
        assert type(merit) is Merit, f"{type(merit)} steps, and not Merit"
        self.steps = 0
        self._wrapper = wrapper
        self._flats = flat_partitions(self._wrapper)
        self._weights = [gather(flat.detach()) for flat in self._flats]
        self._moments = [
            tuple(gather(merit.state[flat].get(name, torch.zeros_like(flat))) for name in ("exp_avg", "exp_avg_sq"))
            for flat in self._flats
        ]
        self._start = [whole.clone() for whole in self._weights]
        merit.register_step_pre_hook(self._replay)
        merit.register_step_post_hook(self._compare)

    def moved(self) -> bool:
        """Whether every group's weights changed in at least one step."""
        pairs = zip(self._start, self._weights, strict=True)
        return self.steps > 0 and not any(torch.equal(start, now) for start, now in pairs)

    def _indices(self, optimizer: Merit) -> list[tuple[dict[str, Any], int]]:
        """ZeRO-1 and 2 call step once for each group, with `param_groups` cut to it."""
        return [
            (group, next(i for i, flat in enumerate(self._flats) if flat is group["params"][0]))
            for group in optimizer.param_groups
        ]

    def _replay(self, optimizer: Merit, *_: Any) -> None:
        for group, index in self._indices(optimizer):
            grad = gather(group["params"][0].grad)
            parameters = buffer_order(self._wrapper)[index]
            for parameter, start in zip(parameters, offsets(self._wrapper, index), strict=True):
                flats = (self._weights[index], grad, *self._moments[index])
                decay = group["weight_decay"] if parameter.dim() > 1 else 0.0
                for state in zip(*(logical_matrices(parameter, flat[start:]) for flat in flats), strict=True):
                    merit_step(*state, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=decay)

    def _compare(self, optimizer: Merit, *_: Any) -> None:
        for _, index in self._indices(optimizer):
            assert torch.equal(gather(self._flats[index].detach()), self._weights[index]), f"step {self.steps}"
            self.steps += index == 0


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, others[name])]
    assert not different, f"not the same bits: {different}"


class Messages(logging.Handler):
    """What Merit logs, from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []
        logger = logging.getLogger("merit_ds")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)  # who has a handler of his own says what it is to get

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))

    def take(self) -> list[tuple[str, str]]:
        lines, self.lines = self.lines, []
        return lines
