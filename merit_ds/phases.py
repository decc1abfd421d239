# SPDX-License-Identifier: Apache-2.0
"""Which rectangles a step works on in which phase, and where their maxima lie: integers only, worked out once.

All maxima of a step lie in one buffer of slots. What process groups exchange comes first, each group's slots in a
region of their own that is handed to the all-reduce as it is; what this rank alone needs follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch.distributed as dist

from merit_ds.layout import Fragment, Matrix, SharedMaxima
from merit_ds.ops.table import KINDS, MATRIX, UNDECAYED, VECTOR, Tile
from merit_ds.shard import Shard


@dataclass(frozen=True)
class Region:
    """The slots [begin, end) that the ranks of a process group reduce."""

    group: dist.ProcessGroup
    begin: int
    end: int


class Source(NamedTuple):
    """Which logical matrix a rectangle is of, and where in it the rectangle begins."""

    matrix: Matrix
    row: int
    col: int


@dataclass
class Plan:
    """The phases' rectangles, and the slots that ranks exchange.

    Attributes:
        cut: fragments of matrices that lie on several data-parallel ranks.
        split: others, of matrices that tensor-parallel ranks share.
        alone: those that need no other rank.
        data, tensor: the regions of the two exchanges.
        carried: (slot in a data region or of this rank's own, slot in a tensor region): what is reduced over data
            parallel ranks first, where those have parts of it, and over tensor-parallel ranks then.
        problems: (slot, shard's number): where a rank tells the others that it refuses its shard.
        unbounded: slots of whole-weight maxima that are not to count.
        sources: of each rectangle, by its tensor and its offset there.
        slots: how many there are.
    """

    cut: list[Tile] = field(default_factory=list)
    split: list[Tile] = field(default_factory=list)
    alone: list[Tile] = field(default_factory=list)
    data: list[Region] = field(default_factory=list)
    tensor: list[Region] = field(default_factory=list)
    carried: list[tuple[int, int]] = field(default_factory=list)
    problems: list[tuple[int, int]] = field(default_factory=list)
    unbounded: list[int] = field(default_factory=list)
    sources: dict[tuple[int, int], Source] = field(default_factory=dict)
    slots: int = 0

    @classmethod
    def build(cls, shards: Sequence[Shard], *, groups: Sequence[int]) -> "Plan":
        """Lay out one step over some shards.

        Args:
            shards: in an order that all ranks share.
            groups: the number of each shard's parameter group, which says where its scalars stand.
        """
        plan = cls()
        data = plan._regions(plan.data, [s.group for s in shards], [s.layout.exchange_size for s in shards])
        tensor = plan._regions(
            plan.tensor, [s.tensor_group for s in shards], [s.layout.tensor_exchange_size for s in shards]
        )
        for number, (shard, group) in enumerate(zip(shards, groups, strict=True)):
            bases = data[number], tensor[number]
            plan.problems += [(base, number) for base in bases if base is not None]
            if bases[0] is not None and bases[1] is not None:
                plan.carried.append((bases[0], bases[1]))
            if shard.problem is None:
                for fragment in (*shard.layout.cut, *shard.layout.whole):
                    plan._add(fragment, number, group, *bases)
        return plan

    def _regions(
        self, regions: list[Region], groups: Sequence[dist.ProcessGroup | None], sizes: Sequence[int]
    ) -> list[int | None]:
        """Give each process group a region, and return where in it each shard's slots begin; None without a group."""
        bases: list[int | None] = [None] * len(groups)
        for group in dict.fromkeys(group for group in groups if group is not None):
            members = [number for number, other in enumerate(groups) if other is group]
            *begins, end = accumulate((sizes[number] for number in members), initial=self.slots)
            for number, begin in zip(members, begins, strict=True):
                bases[number] = begin
            regions.append(Region(group, self.slots, end))
            self.slots = end
        return bases

    def _add(self, fragment: Fragment, number: int, group: int, data: int | None, tensor: int | None) -> None:
        """Enter a fragment's rectangles in its phase, and its maxima in the buffer."""
        tiles = self.alone
        rows, cols, whole = [-1] * fragment.rows, -1, -1
        if fragment.matrix.has_axes:
            rows = list(self._take(fragment.rows))
        if fragment.shared is not None:
            assert data is not None
            tiles = self.cut
            rows, cols, whole = _in_region(fragment.shared, rows, data)
        elif fragment.matrix.scaled:
            cols = self._take(fragment.matrix.cols).start if fragment.matrix.has_axes else -1
            whole = self._take(1).start
        if fragment.tensor_slot is not None:
            assert tensor is not None
            tiles = self.cut if fragment.shared is not None else self.split
            self.carried += _carried(fragment, rows, cols, whole, tensor + fragment.tensor_slot)
        if fragment.matrix.has_axes and not fragment.matrix.whole_bound:
            self.unbounded.append(whole)
        kind = UNDECAYED if not fragment.matrix.decayed else VECTOR if fragment.matrix.is_vector else MATRIX
        first_row = fragment.first // fragment.matrix.cols
        for piece in fragment.rectangles():
            self.sources[number, piece.offset] = Source(fragment.matrix, first_row + piece.row, piece.col)
            size = piece.cols, piece.rows, piece.cols  # end to end in memory, so the pitch is the width
            col_slot = cols + piece.col if cols >= 0 else -1
            tiles.append(Tile(number, piece.offset, *size, rows[piece.row], col_slot, whole, KINDS * group + kind))

    def _take(self, count: int) -> range:
        """So many slots of this rank's own."""
        self.slots += count
        return range(self.slots - count, self.slots)


def _in_region(shared: SharedMaxima, rows: list[int], base: int) -> tuple[list[int], int, int]:
    """A cut fragment's slots: whole, columns and the outer rows that a boundary divides are exchanged.

    A divided row is a rectangle of its own, so that a rectangle's rows still lie one after the other.
    """
    rows = list(rows)
    for row, slot in {(0, shared.first_row), (len(rows) - 1, shared.last_row)}:  # one and the same in a single row
        if slot is not None:
            rows[row] = base + slot
    return rows, -1 if shared.cols is None else base + shared.cols, base + shared.whole


def _carried(fragment: Fragment, rows: list[int], cols: int, whole: int, slot: int) -> list[tuple[int, int]]:
    """The whole weight, and what runs across the split: columns where rows are split, rows where columns are."""
    across: Sequence[int] = []
    if fragment.matrix.has_axes:
        across = range(cols, cols + fragment.matrix.cols) if fragment.matrix.split == "rows" else rows
    return list(zip((whole, *across), range(slot, slot + fragment.tensor_slots), strict=True))
