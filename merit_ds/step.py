# SPDX-License-Identifier: Apache-2.0
"""The step's phases, ordered so that communication hides behind work.

1. accumulate the cut fragments, start the data-parallel MAX
2. accumulate the fragments of matrices that tensor-parallel ranks share
3. wait for 1, start the tensor-parallel MAX
4. both passes for the fragments that need no other rank
5. wait for what is under way
6. apply what was exchanged

Without tensor parallelism there is no 2 and 3, and the unsharded step is 4 alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from merit_ds.collectives import Exchange
from merit_ds.errors import UnsupportedError
from merit_ds.fsdp import local_part
from merit_ds.inspection import Inspector, observe
from merit_ds.ops import Kernel
from merit_ds.ops.rule import MAX
from merit_ds.ops.table import KINDS, Operands, lr_on_device
from merit_ds.phases import Plan, Region
from merit_ds.shard import Shard


class HalfwayError(UnsupportedError):
    """A refusal after which moments may have changed: another try would not be exact."""


class Stepper:
    """Steps some shards on one device, again and again: a plan, with its tables and its buffer of maxima there.

    Args:
        shards: in an order that all ranks share.
        groups: the number of each shard's parameter group.
        kernel: what does the arithmetic.
        device: the shards'.
    """

    def __init__(self, shards: Sequence[Shard], *, groups: Sequence[int], kernel: Kernel, device: torch.device) -> None:
        self.device = device
        self.shards = shards
        self.groups = groups
        self._kernel = kernel
        self._norm = kernel.rule.norm or MAX  # without norms the exchange carries the ranks' refusals alone
        self.plan = plan = Plan.build(shards, groups=groups)
        self._cut, self._split, self._alone = (
            kernel.table(tiles, device) if tiles else None for tiles in (plan.cut, plan.split, plan.alone)
        )
        self.maxima = torch.zeros(plan.slots, 2, dtype=self._norm.dtype, device=device)
        self._unbounded = torch.tensor(plan.unbounded, dtype=torch.int64, device=device)
        self._carried = torch.tensor(plan.carried, dtype=torch.int64, device=device).reshape(-1, 2)
        self._rows: list[Any] = []
        self._scalars = torch.zeros(0, device=device)
        self._prepare = kernel.preparer([local_part(shard.tensor).numel() for shard in shards], device)

    def step(
        self,
        operands: Operands,
        settings: Sequence[dict[str, Any]],
        *,
        noop: Tensor | None = None,
        check_agreement: bool = False,
        inspect: Inspector | None = None,
    ) -> None:
        """Step every shard that has a gradient, in place.

        Args:
            settings: of the groups that the shards' numbers mean, for this step.
            noop: one float; if it is not 0, nothing is changed.
            check_agreement: look whether a rank refuses its layout. It costs a device synchronisation, so it is done
                only after a layout was bound, which all ranks do in the same step.
            inspect: is shown every piece when its norms are complete, before a weight is changed. The step's bits are
                the same, but it takes the slower way of two separate passes.

        Raises:
            HalfwayError: on all ranks, before a weight is changed, if one of them found a problem in its shard.
            UnsupportedError: settings have changed while a CUDA graph is captured; nothing is.
        """
        self._set_scalars(settings)
        kernel, cut, split = self._kernel, self._cut, self._split
        arguments = {"scalars": self._scalars, "maxima": self.maxima, "noop": noop}
        run = partial(_run, self._prepare(operands), arguments)
        self.clear()
        if check_agreement:
            self._tell_problems()
        data, tensor = [], []
        if check_agreement or kernel.rule.norm is not None:
            data, tensor = self._exchanges(self.plan.data), self._exchanges(self.plan.tensor)
        run(kernel.accumulate, cut)
        _start(data)
        run(kernel.accumulate, split)
        if tensor:
            _wait(data)
            self.carry_over()
            _start(tensor)
        if check_agreement:
            _wait(data)
            _wait(tensor)
            if problem := self._problem():
                raise HalfwayError(problem)
        run(kernel.step if inspect is None else kernel.accumulate, self._alone)
        _wait(data)
        if tensor:
            _wait(tensor)
            self.carry_back()
        if inspect is not None and (noop is None or not bool(noop)):
            inspect(observe(kernel.rule, operands, self.shards, self.plan, self._scalars, self.maxima))
        if inspect is not None:
            run(kernel.apply, self._alone)
        run(kernel.apply, cut)
        run(kernel.apply, split)

    def agree(self, problem: str | None = None) -> None:
        """Find out whether a rank refuses its layout or this step, by an exchange of that alone.

        Args:
            problem: why this rank refuses the step, else None.

        Raises:
            UnsupportedError: on all ranks.
        """
        self.maxima.zero_()
        self._tell_problems(problem)
        exchanges = [*self._exchanges(self.plan.data), *self._exchanges(self.plan.tensor)]
        _start(exchanges)
        _wait(exchanges)
        if found := problem or self._problem():
            raise UnsupportedError(found)

    def clear(self) -> None:
        """Empty all slots. A whole-weight ratio that is not to count becomes 0, whatever finite numbers come in."""
        self.maxima.zero_()
        if self.plan.unbounded:
            weight, update = self.maxima.unbind(1)
            weight[self._unbounded] = 1
            update[self._unbounded] = inf

    def _set_scalars(self, settings: Sequence[dict[str, Any]]) -> None:
        """Bring the scalars to the device, where they stay in one place: a CUDA graph may have captured it."""
        fields = self._kernel.rule.hyper._fields
        rows = [row for group in settings for row in self._kernel.rule.scalars(group)]
        if rows != self._rows:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(
                    "Merit's settings have changed since its last step, and a CUDA graph would not follow them: take a "
                    "step before the capture, and give lr as a tensor on the GPU (an optimizer with bias_correction "
                    "cannot be captured: its settings change with every step)"
                )
            if self._scalars.shape[0] != len(rows):
                self._scalars = torch.empty(len(rows), len(fields), dtype=torch.float32, device=self.device)
            pinned = self.device.type == "cuda"  # else the copy would wait for all work before it
            made = torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=pinned)
            self._scalars.copy_(made, non_blocking=True)
            self._rows = rows
        for number, group in enumerate(settings):
            lr = lr_on_device(group)
            if lr is not None:
                self._scalars[KINDS * number : KINDS * (number + 1), fields.index("lr")] = lr

    def _exchanges(self, regions: Sequence[Region]) -> list[Exchange]:
        return [self._norm.exchange(self.maxima[region.begin : region.end], group=region.group) for region in regions]

    def carry_over(self) -> None:
        """Between the exchanges: hand what the data-parallel ranks found to the tensor-parallel ones."""
        own, carried = self._carried.unbind(1)
        self.maxima[carried] = self.maxima[own]

    def carry_back(self) -> None:
        """After the exchanges: take the tensor-parallel ranks' maxima back to where the rectangles look for them."""
        own, carried = self._carried.unbind(1)
        self.maxima[own] = self.maxima[carried]

    def _tell_problems(self, problem: str | None = None) -> None:
        for slot, number in self.plan.problems:
            self.maxima[slot] = float((problem or self.shards[number].problem) is not None)

    def _problem(self) -> str | None:
        """Why one of the ranks refuses its layout, as they have told each other."""
        problems = [shard.problem for shard in self.shards if shard.problem is not None]
        if problems:
            return problems[0]
        if any(bool(self.maxima[slot, 0] != 0) for slot, _ in self.plan.problems):
            return "another rank refuses the step or its partition of the weights: see its message"
        return None


def _run(prepared: Any, arguments: dict[str, Any], operation: Callable[..., None], tiles: Tensor | None) -> None:
    """One operation over a phase's rectangles, if it has any."""
    if tiles is not None:
        operation(prepared, tiles=tiles, **arguments)


def _start(exchanges: Sequence[Exchange]) -> None:
    for exchange in exchanges:
        exchange.start()


def _wait(exchanges: Sequence[Exchange]) -> None:
    """Harmless when repeated."""
    for exchange in exchanges:
        exchange.wait()
