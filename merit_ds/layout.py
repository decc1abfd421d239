# SPDX-License-Identifier: Apache-2.0
"""Which piece of which logical matrix a rank holds, and which maxima it must share: integers only.

A group's weights lie end to end in one flat buffer, and each rank owns one slice of it, cut anywhere:

    rank 0's slice                rank 1's slice
    [ A A A A | B B B B | C C ]   [ C C C C C C | D D D | pad ]
                          ^^^ C is cut: its first row here, the rest there; A, B, D are whole

A cut piece of a row-major matrix is at most three rectangles: the end of a row, whole rows, the start of a row.
Its maxima over columns and over everything, and over each row that a boundary divides, are shared with the other
ranks. Who shares what follows from the shapes and the boundaries alone, so ranks agree without talking.
An unsharded tensor is the layout with a single slice, in which every fragment is whole.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A logical matrix [rows, cols], row-major from `start` on in the flat buffer.

    A vector is one row of which only the whole-weight maximum counts.
    """

    start: int
    rows: int
    cols: int
    is_vector: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols


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

    `cols` is the slot of column 0 (None for a vector); `first_row` and `last_row` are the slots of the fragment's
    outer rows where a boundary divides them, else None: a row that lies on one rank is nobody else's business.
    """

    whole: int
    cols: int | None
    first_row: int | None
    last_row: int | None


@dataclass(frozen=True)
class Fragment:
    """A run of a matrix in a rank's slice: `numel` elements from `first` on (counted in the matrix), at `offset`."""

    matrix: Matrix
    offset: int
    first: int
    numel: int
    shared: SharedMaxima | None

    @property
    def rows(self) -> int:
        """Number of rows of which it holds at least a part."""
        return (self.first + self.numel - 1) // self.matrix.cols - self.first // self.matrix.cols + 1

    def rectangles(self) -> list[Rectangle]:
        """The fragment as one to three rectangles, in memory order."""
        cols = self.matrix.cols
        begin, end = self.first % cols, (self.first + self.numel) % cols
        if self.rows == 1:
            return [Rectangle(self.offset, 0, begin, 1, self.numel)]
        head = cols - begin if begin else 0
        body = self.numel - head - end
        pieces = [
            Rectangle(self.offset, 0, begin, 1, head),
            Rectangle(self.offset + head, int(head > 0), 0, body // cols, cols),
            Rectangle(self.offset + head + body, self.rows - 1, 0, 1, end),
        ]
        return [piece for piece in pieces if piece.rows * piece.cols > 0]


@dataclass(frozen=True)
class ShardLayout:
    """One rank's fragments, and the number of maxima (of |w|, and as many of |u|) that all ranks exchange.

    Slot 0 of the exchange belongs to no matrix: in it a rank can tell the others that it must refuse.
    """

    cut: tuple[Fragment, ...]
    whole: tuple[Fragment, ...]
    exchange_size: int

    @classmethod
    def build(cls, matrices: Sequence[Matrix], *, bounds: Sequence[int], rank: int) -> "ShardLayout":
        """Lay out the slice [bounds[rank], bounds[rank + 1]) of a flat buffer.

        Args:
            matrices: what lies in the buffer, by ascending start; gaps are padding. Zero-size ones are skipped.
            bounds: the slices' boundaries, ascending, one more than there are ranks.
            rank: whose fragments to return; the exchange's order and size do not depend on it.
        """
        begin, end = bounds[rank], bounds[rank + 1]
        cut: list[Fragment] = []
        whole: list[Fragment] = []
        next_slot = 1
        for matrix in matrices:
            inner = bounds[bisect_right(bounds, matrix.start) : bisect_left(bounds, matrix.stop)]
            low, high = max(begin, matrix.start), min(end, matrix.stop)
            here = (matrix, low - begin, low - matrix.start, high - low)
            if not inner:
                if low < high:
                    whole.append(Fragment(*here, shared=None))
                continue
            divided = _divided_rows(matrix, inner)
            if low < high:
                cut.append(Fragment(*here, shared=_shared(matrix, low, high, divided, next_slot)))
            next_slot += 1 if matrix.is_vector else 1 + matrix.cols + len(divided)
        return cls(tuple(cut), tuple(whole), next_slot)


def _divided_rows(matrix: Matrix, inner: Sequence[int]) -> list[int]:
    """Rows with a boundary inside; of a vector only the whole counts."""
    if matrix.is_vector:
        return []
    offsets = [bound - matrix.start for bound in inner]
    return sorted({offset // matrix.cols for offset in offsets if offset % matrix.cols})


def _shared(matrix: Matrix, low: int, high: int, divided: list[int], slot: int) -> SharedMaxima:
    """The slots of a cut fragment [low, high), whose matrix's block is: whole, columns, divided rows."""
    if matrix.is_vector:
        return SharedMaxima(whole=slot, cols=None, first_row=None, last_row=None)

    def slot_of(row: int) -> int | None:
        index = bisect_left(divided, row)
        return slot + 1 + matrix.cols + index if index < len(divided) and divided[index] == row else None

    first_row = (low - matrix.start) // matrix.cols
    last_row = (high - 1 - matrix.start) // matrix.cols
    return SharedMaxima(whole=slot, cols=slot + 1, first_row=slot_of(first_row), last_row=slot_of(last_row))
