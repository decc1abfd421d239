# SPDX-License-Identifier: Apache-2.0
"""The step's four phases, ordered so that communication hides behind work.

1. accumulate the cut fragments        3. both passes for the whole fragments
2. start the MAX all-reduce            4. wait for it, apply the cut fragments

The unsharded step is the same with nothing cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from merit_ds.collectives import MaxExchange
from merit_ds.errors import UnsupportedError
from merit_ds.layout import Fragment
from merit_ds.ops import Hyper, Maxima, accumulate, apply
from merit_ds.shard import Shard


@dataclass(frozen=True)
class Task:
    """A tensor to step, its flat gradient, its moments, and this step's scalars for its matrices and its vectors."""

    shard: Shard
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper
    vector_hyper: Hyper

    def accumulate(self, fragment: Fragment, maxima: Maxima) -> None:
        """First pass over one of the shard's fragments."""
        accumulate(
            self.shard.tensor.detach().view(-1),
            self.grad,
            self.exp_avg.view(-1),
            self.exp_avg_sq.view(-1),
            maxima,
            fragment=fragment,
            hyper=self._hyper_of(fragment),
        )

    def apply(self, fragment: Fragment, maxima: Maxima) -> None:
        """Second pass; `maxima` must be complete."""
        apply(
            self.shard.tensor.detach().view(-1),
            self.exp_avg.view(-1),
            self.exp_avg_sq.view(-1),
            maxima,
            fragment=fragment,
            hyper=self._hyper_of(fragment),
        )

    def _hyper_of(self, fragment: Fragment) -> Hyper:
        return self.vector_hyper if fragment.matrix.is_vector else self.hyper


@dataclass(frozen=True)
class _Sharded:
    """A task whose weights may be cut, and its part of the exchange, [2, layout.exchange_size]."""

    task: Task
    slots: Tensor

    def tell_problem(self) -> None:
        if self.task.shard.problem is not None:
            self.slots[0, 0] = 1.0

    def told_problem(self) -> bool:
        return bool(self.slots[0, 0] != 0)


@dataclass(frozen=True)
class _Cut:
    """A cut fragment; its columns' and whole-weight maxima lie in the exchange itself, its rows' beside it."""

    task: Task
    fragment: Fragment
    maxima: Maxima
    divided_rows: tuple[tuple[Tensor, Tensor], ...]  # pairs [2]: the fragment's own row, that row in the exchange

    def hand_in_rows(self) -> None:
        for own, shared in self.divided_rows:
            shared.copy_(own)

    def take_back_rows(self) -> None:
        for own, shared in self.divided_rows:
            own.copy_(shared)


def take_step(tasks: Sequence[Task], *, check_agreement: bool) -> None:
    """Step every task's tensor, in place.

    Args:
        check_agreement: look whether a rank refuses its layout. It costs a device synchronisation, so it is done only
            after a layout was bound, which all ranks do in the same step.

    Raises:
        UnsupportedError: on all ranks, before a weight is changed, if one of them found a problem in its shard.
    """
    exchanges, sharded = _open_exchanges(tasks)
    cuts = [cut for item in sharded if item.task.shard.problem is None for cut in _cuts(item)]
    for cut in cuts:
        cut.task.accumulate(cut.fragment, cut.maxima)
        cut.hand_in_rows()
    for exchange in exchanges:
        exchange.start()
    if check_agreement:
        for exchange in exchanges:
            exchange.wait()
        _refuse_problems(tasks, sharded)
    for task in tasks:
        for fragment in task.shard.layout.whole:
            maxima = _fresh_maxima(fragment, task.shard.tensor.device)
            task.accumulate(fragment, maxima)
            task.apply(fragment, maxima)
    for exchange in exchanges:
        exchange.wait()
    for cut in cuts:
        cut.take_back_rows()
        cut.task.apply(cut.fragment, cut.maxima)


def _open_exchanges(tasks: Sequence[Task]) -> tuple[list[MaxExchange], list[_Sharded]]:
    """One exchange for each process group, with room for every sharded task of that group, in the tasks' order."""
    by_group: dict[dist.ProcessGroup, list[Task]] = {}
    for task in tasks:
        if task.shard.group is not None:
            by_group.setdefault(task.shard.group, []).append(task)
    exchanges, sharded = [], []
    for group, members in by_group.items():
        sizes = [task.shard.layout.exchange_size for task in members]
        exchange = MaxExchange(sum(sizes), device=members[0].shard.tensor.device, group=group)
        exchanges.append(exchange)
        for task, slots in zip(members, torch.split(exchange.maxima, sizes, dim=1), strict=True):
            sharded.append(_Sharded(task, slots))
            sharded[-1].tell_problem()
    return exchanges, sharded


def _refuse_problems(tasks: Sequence[Task], sharded: Sequence[_Sharded]) -> None:
    problems = [task.shard.problem for task in tasks if task.shard.problem is not None]
    if problems:
        raise UnsupportedError(problems[0])
    if any(item.told_problem() for item in sharded):
        raise UnsupportedError("another rank refuses its partition of the weights: see its message")


def _cuts(item: _Sharded) -> Iterator[_Cut]:
    for fragment in item.task.shard.layout.cut:
        shared = fragment.shared
        assert shared is not None
        rows = torch.zeros(2, fragment.rows, dtype=torch.float32, device=item.slots.device)
        first = shared.cols if shared.cols is not None else shared.whole
        count = fragment.matrix.cols if shared.cols is not None else 0
        maxima = Maxima(rows, item.slots[:, first : first + count], item.slots[:, shared.whole])
        outer = {(0, shared.first_row), (fragment.rows - 1, shared.last_row)}  # one and the same in a single row
        divided = tuple((rows[:, row], item.slots[:, slot]) for row, slot in outer if slot is not None)
        yield _Cut(item.task, fragment, maxima, divided)


def _fresh_maxima(fragment: Fragment, device: torch.device) -> Maxima:
    rows, cols = (0, 0) if fragment.matrix.is_vector else (fragment.rows, fragment.matrix.cols)
    zeros = torch.zeros(2, rows + cols + 1, dtype=torch.float32, device=device)
    return Maxima(zeros[:, :rows], zeros[:, rows : rows + cols], zeros[:, -1])
