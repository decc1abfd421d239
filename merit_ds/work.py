# SPDX-License-Identifier: Apache-2.0
"""What one call of `step()` does, again and again: its shards, on whatever devices they lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from merit_ds.errors import UnsupportedError
from merit_ds.inspection import Inspector
from merit_ds.operands import Gatherer
from merit_ds.ops import select_kernel
from merit_ds.ops.rule import Rule
from merit_ds.ops.select import eager_kernel
from merit_ds.ops.table import Operands
from merit_ds.shard import Shard
from merit_ds.step import Stepper

State = dict[str, Any]
"""What an optimizer keeps of a tensor."""


class Work:
    """The steppers of some shards, one for each device, and the tensors' states.

    Looking up a tensor's state calls Python code of torch. For 300 weights that takes as long as the kernel of small
    ones, so it is done again only when there are other states.

    Args:
        shards: in an order that all ranks share.
        groups: the number of each shard's parameter group.
        rule: the optimizer's formula.
        fused: which kernel, as for `merit_ds.ops.select_kernel`.
        stepper: what takes the rule's steps.

    Attributes:
        tensors: those that are stepped.
        idle: those of frozen parameters, which are not.
        agreed: whether the ranks have found that none of them refuses its shards.

    Raises:
        UnsupportedError: the shards lie on several devices and process groups, or there is no kernel as `fused` asks.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        groups: Sequence[int],
        rule: Rule,
        fused: bool | None,
        stepper: type[Stepper] = Stepper,
    ) -> None:
        self.idle = [shard.tensor for shard in shards if shard.idle]
        groups = [group for shard, group in zip(shards, groups, strict=True) if not shard.idle]
        shards = [shard for shard in shards if not shard.idle]
        self.tensors = [shard.tensor for shard in shards]
        self.gather = Gatherer(shards, moments=rule.moments)
        self._rule = rule
        self._groups = groups
        self.agreed = False
        self._states: list[State | None] = [None] * len(shards)
        self._all_states: list[State] = []
        self._steppers: list[tuple[list[int], Stepper]] = []
        devices = list(dict.fromkeys(tensor.device for tensor in self.tensors))
        if len(devices) > 1 and any(map(_is_shared, shards)):
            raise UnsupportedError(f"Merit does not support sharded weights on several devices in one step: {devices}")
        for device in devices:
            members = [number for number, tensor in enumerate(self.tensors) if tensor.device == device]
            chosen = [shards[number] for number in members]
            try:
                kernel = select_kernel(device, fused=fused, rule=rule)
            except UnsupportedError as refusal:
                if not any(map(_is_shared, chosen)):
                    raise
                # The other ranks may have a kernel and wait in the exchange: it tells them.
                kernel, chosen = eager_kernel(rule), [replace(shard, problem=str(refusal)) for shard in chosen]
            numbers = members if rule.counts_steps else [groups[number] for number in members]
            made = stepper(chosen, groups=numbers, kernel=kernel, device=device)
            self._steppers.append((members, made))

    def states(
        self, grads: Sequence[Tensor | None], state: Mapping[Tensor, State], create: Callable[[Tensor], State]
    ) -> list[State | None]:
        """The tensors' states; only a tensor that never had a gradient may have none.

        Args:
            grads: the tensors' gradients.
            state: the optimizer's.
            create: returns a tensor's state, a new one where it has none.
        """
        known = _same(list(state.values()), self._all_states)
        if not known or (not all(self._states) and any(map(_lacks_state, self._states, grads))):
            self._states = [
                create(tensor) if grad is not None or tensor in state else None
                for tensor, grad in zip(self.tensors, grads, strict=True)
            ]
            self._all_states = list(state.values())
        return self._states

    def agree(self, problem: str | None) -> None:
        """Refuse a step on all ranks or none, before anything is changed; a collective. See `Stepper.agree`."""
        for _, stepper in self._steppers:
            stepper.agree(problem)

    def step(
        self,
        operands: Operands,
        param_groups: Sequence[dict[str, Any]],
        *,
        noop: Tensor | float | None,
        check_agreement: bool,
        inspect: Inspector | None = None,
    ) -> None:
        """Step every shard that has a gradient; see `Stepper.step`.

        Args:
            operands: made by `gather`.
            param_groups: the groups that the shards' numbers mean.
            noop: one number, on any device; if it is not 0, nothing is changed.
            check_agreement: whether this step has to find out if a rank refuses its shard.
            inspect: see `Stepper.step`.

        Raises:
            UnsupportedError: see `Stepper.step`.
        """
        settings = self._with_steps(param_groups) if self._rule.counts_steps else param_groups
        for members, stepper in self._steppers:
            own = operands if len(self._steppers) == 1 else operands.of(members)
            flag = None if noop is None else torch.as_tensor(noop, dtype=torch.float32, device=stepper.device)
            stepper.step(own, settings, noop=flag, check_agreement=check_agreement, inspect=inspect)

    def count(self, grads: Sequence[Tensor | None], param_groups: Sequence[dict[str, Any]]) -> None:
        """Count a step in the states of all tensors that have a gradient, and in their groups."""
        for number, state, grad in zip(self._groups, self._states, grads, strict=True):
            if state is not None and grad is not None:
                state["step"] = step = state["step"] + 1
                # Not one more with each call: ZeRO-3 steps a group's tensors in several.
                if step > param_groups[number]["step"]:
                    param_groups[number]["step"] = step

    def _with_steps(self, param_groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each tensor its group's settings, and how often it was stepped."""
        return [
            {**param_groups[group], "step": 0 if state is None else state["step"]}
            for group, state in zip(self._groups, self._states, strict=True)
        ]


def _lacks_state(state: State | None, grad: Tensor | None) -> bool:
    return not state and grad is not None


def _is_shared(shard: Shard) -> bool:
    return shard.group is not None or shard.tensor_group is not None


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether they hold the very same objects."""
    return len(first) == len(second) and all(map(is_, first, second))
