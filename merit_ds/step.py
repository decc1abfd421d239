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

from collections.abc import Sequence
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
    """A tensor to step: its weights, gradient and moments as flat local slices, and this step's scalars.

    Attributes:
        hyper, undecayed: with the group's weight decay, and without.
        decay_vectors: whether vectors take the first.
    """

    shard: Shard
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper
    undecayed: Hyper
    decay_vectors: bool

    def accumulate(self, fragment: Fragment, maxima: Maxima) -> None:
        """First pass over one of the shard's fragments."""
        hyper = self._hyper_of(fragment)
        slices = (self.weight, self.grad, self.exp_avg, self.exp_avg_sq)
        accumulate(*slices, maxima, fragment=fragment, hyper=hyper)

    def apply(self, fragment: Fragment, maxima: Maxima) -> None:
        """Second pass; `maxima` must be complete."""
        hyper = self._hyper_of(fragment)
        apply(self.weight, self.exp_avg, self.exp_avg_sq, maxima, fragment=fragment, hyper=hyper)

    def _hyper_of(self, fragment: Fragment) -> Hyper:
        decays = fragment.matrix.decayed and (self.decay_vectors or not fragment.matrix.is_vector)
        return self.hyper if decays else self.undecayed


@dataclass(frozen=True)
class _Piece:
    """A fragment of a task, with its maxima."""

    task: Task
    fragment: Fragment
    maxima: Maxima

    def accumulate(self) -> None:
        self.task.accumulate(self.fragment, self.maxima)

    def apply(self) -> None:
        self.task.apply(self.fragment, self.maxima)


class _Round:
    """One all-reduce MAX over each process group of a kind, with room for all tasks of the group, in their order.

    Maxima are handed in by `start` and complete after `wait`. In slot 0 of a task a rank tells of a problem.

    Args:
        shards: those of the tasks.
        groups, sizes: for each shard its process group, None for none, and its slots.
    """

    def __init__(
        self, shards: Sequence[Shard], *, groups: Sequence[dist.ProcessGroup | None], sizes: Sequence[int]
    ) -> None:
        self.slots: list[Tensor | None] = [None] * len(shards)
        """By task, its part of the exchange, [2, size]."""
        self._exchanges: list[MaxExchange] = []
        self._links: list[tuple[Tensor, Tensor]] = []
        for group in dict.fromkeys(group for group in groups if group is not None):
            members = [number for number, other in enumerate(groups) if other is group]
            split = [sizes[number] for number in members]
            self._exchanges.append(MaxExchange(sum(split), device=shards[members[0]].tensor.device, group=group))
            for number, slots in zip(members, torch.split(self._exchanges[-1].maxima, split, dim=1), strict=True):
                self.slots[number] = slots
                slots[0, 0] = float(shards[number].problem is not None)

    def __bool__(self) -> bool:
        return bool(self._exchanges)

    def link(self, own: Tensor, shared: Tensor) -> None:
        """Have `start` copy own maxima into their place in the exchange, and `wait` copy them back."""
        self._links.append((own, shared))

    def start(self) -> None:
        for own, shared in self._links:
            shared.copy_(own)
        for exchange in self._exchanges:
            exchange.start()

    def wait(self) -> None:
        """Harmless when repeated."""
        for exchange in self._exchanges:
            exchange.wait()
        for own, shared in self._links:
            own.copy_(shared)
        self._links.clear()

    def told_problem(self) -> bool:
        return any(slots is not None and bool(slots[0, 0] != 0) for slots in self.slots)


def take_step(tasks: Sequence[Task], *, check_agreement: bool) -> None:
    """Step every task's tensor, in place.

    Args:
        check_agreement: look whether a rank refuses its layout. It costs a device synchronisation, so it is done only
            after a layout was bound, which all ranks do in the same step.

    Raises:
        UnsupportedError: on all ranks, before a weight is changed, if one of them found a problem in its shard.
    """
    shards = [task.shard for task in tasks]
    data = _Round(shards, groups=[s.group for s in shards], sizes=[s.layout.exchange_size for s in shards])
    tensor = _Round(
        shards, groups=[s.tensor_group for s in shards], sizes=[s.layout.tensor_exchange_size for s in shards]
    )
    cut, split, alone = _pieces(tasks, data, tensor)
    for piece in cut:
        piece.accumulate()
    data.start()
    for piece in split:
        piece.accumulate()
    if tensor or check_agreement:
        data.wait()
        tensor.start()
    if check_agreement:
        tensor.wait()
        _refuse_problems(shards, data, tensor)
    for piece in alone:
        piece.accumulate()
        piece.apply()
    data.wait()
    tensor.wait()
    for piece in (*cut, *split):
        piece.apply()


def _pieces(tasks: Sequence[Task], data: _Round, tensor: _Round) -> tuple[list[_Piece], list[_Piece], list[_Piece]]:
    """All fragments: those that are cut, of the others those of split matrices, and those that need no other rank."""
    cut: list[_Piece] = []
    split: list[_Piece] = []
    alone: list[_Piece] = []
    for task, data_slots, tensor_slots in zip(tasks, data.slots, tensor.slots, strict=True):
        if data_slots is not None and tensor_slots is not None:
            tensor.link(data_slots[:, 0], tensor_slots[:, 0])  # a problem that the data-parallel ranks have told
        if task.shard.problem is not None:
            continue
        for fragment in (*task.shard.layout.cut, *task.shard.layout.whole):
            maxima = _fresh_maxima(fragment, task.shard.tensor.device)
            if fragment.tensor_slot is not None:
                assert tensor_slots is not None
                _link_tensor(tensor, fragment, maxima, tensor_slots[:, fragment.tensor_slot :])
            if fragment.shared is not None:
                assert data_slots is not None
                _link_data(data, fragment, maxima, data_slots)
            kind = cut if fragment.shared is not None else alone if fragment.tensor_slot is None else split
            kind.append(_Piece(task, fragment, maxima))
    return cut, split, alone


def _link_data(exchange: _Round, fragment: Fragment, maxima: Maxima, slots: Tensor) -> None:
    """Columns, whole weight, and the outer rows where a boundary divides them."""
    shared = fragment.shared
    assert shared is not None
    exchange.link(maxima.whole, slots[:, shared.whole])
    if shared.cols is not None:
        exchange.link(maxima.cols, slots[:, shared.cols : shared.cols + fragment.matrix.cols])
    for row, slot in {(0, shared.first_row), (fragment.rows - 1, shared.last_row)}:  # one and the same in a single row
        if slot is not None:
            exchange.link(maxima.rows[:, row], slots[:, slot])


def _link_tensor(exchange: _Round, fragment: Fragment, maxima: Maxima, slots: Tensor) -> None:
    """The whole weight, and what runs across the split: columns where rows are split, rows where columns are."""
    exchange.link(maxima.whole, slots[:, 0])
    if not fragment.matrix.is_vector:
        across = maxima.cols if fragment.matrix.split == "rows" else maxima.rows
        exchange.link(across, slots[:, 1 : fragment.tensor_slots])


def _fresh_maxima(fragment: Fragment, device: torch.device) -> Maxima:
    rows, cols = (fragment.rows, fragment.matrix.cols) if fragment.matrix.has_axes else (0, 0)
    zeros = torch.zeros(2, rows + cols + 1, dtype=torch.float32, device=device)
    return Maxima(zeros[:, :rows], zeros[:, rows : rows + cols], zeros[:, -1])


def _refuse_problems(shards: Sequence[Shard], *rounds: _Round) -> None:
    problems = [shard.problem for shard in shards if shard.problem is not None]
    if problems:
        raise UnsupportedError(problems[0])
    if any(exchange.told_problem() for exchange in rounds):
        raise UnsupportedError("another rank refuses its partition of the weights: see its message")
