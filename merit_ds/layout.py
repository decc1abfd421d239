# SPDX-License-Identifier: Apache-2.0
"""Which piece of which logical matrix a rank holds, and which maxima it must share: integers only.

A group's weights lie end to end in one flat buffer, and each rank owns one slice of it, cut anywhere:

    rank 0's slice                rank 1's slice
    [ A A A A | B B B B | C C ]   [ C C C C C C | D D D | pad ]
                          ^^^ C is cut: its first row here, the rest there; A, B, D are whole

A cut piece of a row-major matrix is at most three rectangles: the end of a row, whole rows, the start of a row.
(A part of a fused weight may lie in bands of whole rows, with other parts between them.)
Its maxima over columns and over everything, and over each row that a boundary divides, are shared with the other
ranks. Who shares what follows from the shapes and the boundaries alone, so ranks agree without talking.
An unsharded tensor is the layout with a single slice, in which every fragment is whole.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [rows, cols], row-major from `start` on in the flat buffer.

    A vector is one row of which only the whole-weight maximum counts. A part of a fused weight may come in bands: runs
    of `band` rows, each `pitch` rows after the last; 0 for a matrix in one piece.

    Attributes:
        split: the axis along which tensor-parallel ranks hold parts of it, "rows" or "cols"; None: each has it all.
        decayed: False keeps weight decay away from it.
        scaled: False leaves out the trust ratio (s = 1), and with it all maxima.
        elementwise: False leaves out the maxima of rows and columns: one ratio, as for a vector.
        whole_bound: False leaves out the whole-weight ratio where rows and columns have theirs.
    """

    start: int
    rows: int
    cols: int
    is_vector: bool = False
    band: int = 0
    pitch: int = 0
    split: Literal["rows", "cols"] | None = None
    decayed: bool = True
    scaled: bool = True
    elementwise: bool = True
    whole_bound: bool = True

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def has_axes(self) -> bool:
        """Whether maxima of rows and columns count."""
        return self.scaled and self.elementwise and not self.is_vector

    @property
    def stop(self) -> int:
        return self.position(self.numel - 1) + 1 if self.numel else self.start

    def position(self, index: int) -> int:
        """Where its element number `index`, counted row by row, lies in the flat buffer."""
        row, col = divmod(index, self.cols)
        if self.band:
            band, row = divmod(row, self.band)
            row += band * self.pitch
        return self.start + row * self.cols + col

    def count_before(self, position: int) -> int:
        """How many of its elements lie before a position of the flat buffer."""
        before = max(position - self.start, 0)
        if self.band:
            band, rest = divmod(before, self.pitch * self.cols)
            before = band * self.band * self.cols + min(rest, self.band * self.cols)
        return min(before, self.numel)

    def rows_together(self, row: int) -> int:
        """Rows from `row` on that lie end to end."""
        return self.band - row % self.band if self.band else self.rows - row


@dataclass(frozen=True)
class Rectangle:
    """Elements that lie row by row in a rank's slice: `rows` runs of `cols`, end to end from `offset` on.

    `row` counts from the fragment's first row, `col` from the matrix's first column.
    """

    offset: int
    row: int
    col: int
    rows: int
    cols: int


@dataclass(frozen=True)
class SharedMaxima:
    """Where a cut matrix's maxima lie in the exchanged buffer; every rank computes the same numbers.

    `cols` is the slot of column 0 (None without maxima of rows and columns); `first_row` and `last_row` are the slots
    of the fragment's outer rows where a boundary divides them, else None: a row that lies on one rank is nobody else's
    business.
    """

    whole: int
    cols: int | None
    first_row: int | None
    last_row: int | None

    def moved(self, slots: int) -> "SharedMaxima":
        """The same, so many slots later."""
        cols, first_row, last_row = (
            None if slot is None else slot + slots for slot in (self.cols, self.first_row, self.last_row)
        )
        return SharedMaxima(self.whole + slots, cols, first_row, last_row)


@dataclass(frozen=True)
class Fragment:
    """What a rank's slice holds of a matrix: `numel` elements from `first` on, counted in the matrix.

    Attributes:
        begin: the position in the flat buffer that is element 0 of the rank's tensor.
        shared: where its maxima lie in the data-parallel exchange, if other slices hold parts of the matrix.
        tensor_slot: where they begin in the tensor-parallel exchange, if the matrix is split: the whole-weight
            maximum, then the columns' or the fragment's rows', whichever run across the split.
    """

    matrix: Matrix
    begin: int
    first: int
    numel: int
    shared: SharedMaxima | None = None
    tensor_slot: int | None = None

    @property
    def rows(self) -> int:
        """Number of rows of which it holds at least a part."""
        return (self.first + self.numel - 1) // self.matrix.cols - self.first // self.matrix.cols + 1

    @property
    def tensor_slots(self) -> int:
        """Its maxima in the tensor-parallel exchange."""
        if self.matrix.split is None or not self.matrix.scaled:
            return 0
        if not self.matrix.has_axes:
            return 1
        return 1 + (self.matrix.cols if self.matrix.split == "rows" else self.rows)

    def moved(self, offset: int, *, slots: int, tensor_slots: int) -> "Fragment":
        """The same, so many elements later in the rank's tensor, and so many slots later in the two exchanges."""
        return replace(
            self,
            begin=self.begin - offset,
            shared=None if self.shared is None else self.shared.moved(slots),
            tensor_slot=None if self.tensor_slot is None else self.tensor_slot + tensor_slots,
        )

    def rectangles(self) -> list[Rectangle]:
        """The fragment in memory order: for each band at most the end of a row, whole rows, the start of a row."""
        cols, first_row = self.matrix.cols, self.first // self.matrix.cols
        pieces = []
        index, end = self.first, self.first + self.numel
        while index < end:
            row, col = divmod(index, cols)
            if col or end - index < cols:
                rows, width = 1, min(cols - col, end - index)
            else:
                rows, width = min((end - index) // cols, self.matrix.rows_together(row)), cols
            pieces.append(Rectangle(self.matrix.position(index) - self.begin, row - first_row, col, rows, width))
            index += rows * width
        return pieces


@dataclass(frozen=True)
class ShardLayout:
    """One rank's fragments, and the numbers of maxima (of |w|, and as many of |u|) that ranks exchange.

    Slot 0 of both exchanges belongs to no matrix: in it a rank can tell the others that it must refuse.

    Attributes:
        cut: fragments of matrices that lie on several slices.
        whole: those that no other slice has a part in, or that need no maxima.
        exchange_size: slots of the data-parallel exchange, the same on all its ranks.
        tensor_exchange_size: slots of the tensor-parallel exchange, among ranks with the same slice.
    """

    cut: tuple[Fragment, ...]
    whole: tuple[Fragment, ...]
    exchange_size: int
    tensor_exchange_size: int = 1

    @classmethod
    def build(cls, matrices: Sequence[Matrix], *, bounds: Sequence[int], rank: int) -> "ShardLayout":
        """Lay out the slice [bounds[rank], bounds[rank + 1]) of a flat buffer.

        Args:
            matrices: what lies in the buffer, by ascending start; gaps are padding. Zero-size ones are skipped.
            bounds: the slices' boundaries, ascending, one more than there are ranks.
            rank: whose fragments to return; the data-parallel exchange's order and size do not depend on it.
        """
        begin, end = bounds[rank], bounds[rank + 1]
        cut: list[Fragment] = []
        whole: list[Fragment] = []
        next_slot = tensor_slot = 1
        for matrix in matrices:
            first, last = matrix.count_before(begin), matrix.count_before(end)
            fragment = Fragment(matrix, begin, first, last - first)
            cuts = _cuts(matrix, bounds)
            divided = [] if not matrix.has_axes else sorted({cut // matrix.cols for cut in cuts if cut % matrix.cols})
            if fragment.numel:
                if fragment.tensor_slots:
                    fragment = replace(fragment, tensor_slot=tensor_slot)
                    tensor_slot += fragment.tensor_slots
                if cuts:
                    cut.append(replace(fragment, shared=_shared(fragment, divided, next_slot)))
                else:
                    whole.append(fragment)
            if cuts:
                next_slot += 1 + matrix.cols + len(divided) if matrix.has_axes else 1
        return cls(tuple(cut), tuple(whole), next_slot, tensor_slot)

    @classmethod
    def concatenate(cls, layouts: Sequence["ShardLayout"], *, offsets: Sequence[int]) -> "ShardLayout":
        """The layout of a tensor in which others lie, each from its offset on. They have slot 0 in common."""
        cut: list[Fragment] = []
        whole: list[Fragment] = []
        next_slot = tensor_slot = 1
        for layout, offset in zip(layouts, offsets, strict=True):
            shift = {"slots": next_slot - 1, "tensor_slots": tensor_slot - 1}
            cut += [fragment.moved(offset, **shift) for fragment in layout.cut]
            whole += [fragment.moved(offset, **shift) for fragment in layout.whole]
            next_slot += layout.exchange_size - 1
            tensor_slot += layout.tensor_exchange_size - 1
        return cls(tuple(cut), tuple(whole), next_slot, tensor_slot)


def _cuts(matrix: Matrix, bounds: Sequence[int]) -> list[int]:
    """Its elements at which another slice begins; none if no maxima are needed."""
    if not matrix.scaled:
        return []
    inside = bounds[bisect_right(bounds, matrix.start) : bisect_left(bounds, matrix.stop)]
    return [cut for cut in (matrix.count_before(bound) for bound in inside) if 0 < cut < matrix.numel]


def _shared(fragment: Fragment, divided: list[int], slot: int) -> SharedMaxima:
    """The slots of a cut fragment, whose matrix's block is: whole, columns, divided rows."""
    matrix = fragment.matrix
    if not matrix.has_axes:
        return SharedMaxima(whole=slot, cols=None, first_row=None, last_row=None)

    def slot_of(row: int) -> int | None:
        index = bisect_left(divided, row)
        return slot + 1 + matrix.cols + index if index < len(divided) and divided[index] == row else None

    first_row = fragment.first // matrix.cols
    last_row = first_row + fragment.rows - 1
    return SharedMaxima(whole=slot, cols=slot + 1, first_row=slot_of(first_row), last_row=slot_of(last_row))
