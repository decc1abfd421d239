# SPDX-License-Identifier: Apache-2.0
"""Layouts against a brute-force oracle that looks at every element."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_ds.layout import Matrix, Rectangle, ShardLayout


@st.composite
def sharded_buffers(draw):
    """Matrices with padding between them, and boundaries anywhere, some slices empty."""
    matrices, position = [], 0
    for _ in range(draw(st.integers(1, 5))):
        position += draw(st.sampled_from([0, 0, 3]))
        rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 9))
        vector = draw(st.booleans())
        matrices.append(Matrix(position, 1, rows * cols, is_vector=True) if vector else Matrix(position, rows, cols))
        position += rows * cols
    ranks = draw(st.integers(1, 6))
    inner = draw(st.lists(st.integers(0, position), min_size=ranks - 1, max_size=ranks - 1))
    return matrices, [0, *sorted(inner), position + draw(st.sampled_from([0, 4]))]


def elements(fragment):
    """(position in the slice, row, column) of each element that the fragment's rectangles name."""
    first_row = fragment.first // fragment.matrix.cols
    for piece in fragment.rectangles():
        for index, (row, col) in enumerate(itertools.product(range(piece.rows), range(piece.cols))):
            yield piece.offset + index, first_row + piece.row + row, piece.col + col


@settings(max_examples=300, deadline=None)
@given(sharded_buffers())
def test_fragments_cover_every_element_once(buffers):
    matrices, bounds = buffers
    for rank in range(len(bounds) - 1):
        layout = ShardLayout.build(matrices, bounds=bounds, rank=rank)
        found = sorted(
            (bounds[rank] + position, fragment.matrix.start, row, col)
            for fragment in (*layout.cut, *layout.whole)
            for position, row, col in elements(fragment)
        )
        expected = [
            (m.start + row * m.cols + col, m.start, row, col)
            for m in matrices
            for row, col in itertools.product(range(m.rows), range(m.cols))
            if bounds[rank] <= m.start + row * m.cols + col < bounds[rank + 1]
        ]
        assert found == expected


@settings(max_examples=300, deadline=None)
@given(sharded_buffers(), st.integers(0, 2**31))
def test_exchanged_maxima_are_those_of_whole_matrices(buffers, seed):
    """Each rank raises only its own elements into its slots; after the MAX every fragment can read its maxima."""
    matrices, bounds = buffers
    ranks = range(len(bounds) - 1)
    values = np.random.default_rng(seed).random(bounds[-1])
    layouts = [ShardLayout.build(matrices, bounds=bounds, rank=rank) for rank in ranks]
    assert len({layout.exchange_size for layout in layouts}) == 1
    exchange = np.zeros(layouts[0].exchange_size)
    for rank, layout in enumerate(layouts):
        for fragment in layout.cut:
            for position, row, col in elements(fragment):
                for slot in slots(fragment, row, col):
                    exchange[slot] = max(exchange[slot], values[bounds[rank] + position])
    assert exchange[0] == 0, "slot 0 belongs to no matrix"
    for rank, layout in enumerate(layouts):
        for fragment in layout.cut:
            check_maxima(fragment, exchange, values, bounds, rank)
        for fragment in layout.whole:
            assert fragment.numel == fragment.matrix.rows * fragment.matrix.cols


def slots(fragment, row, col):
    """Where an element's magnitude counts in the exchange."""
    first_row = fragment.first // fragment.matrix.cols
    shared = fragment.shared
    yield shared.whole
    if shared.cols is not None:
        yield shared.cols + col
    if row == first_row and shared.first_row is not None:
        yield shared.first_row
    if row == first_row + fragment.rows - 1 and shared.last_row is not None:
        yield shared.last_row


def check_maxima(fragment, exchange, values, bounds, rank):
    matrix, shared = fragment.matrix, fragment.shared
    table = values[matrix.start : matrix.stop].reshape(matrix.rows, matrix.cols)
    assert exchange[shared.whole] == table.max()
    if matrix.is_vector:
        assert shared.cols is shared.first_row is shared.last_row is None
        return
    np.testing.assert_array_equal(exchange[shared.cols : shared.cols + matrix.cols], table.max(0))
    first = fragment.first // matrix.cols
    for row, slot in ((first, shared.first_row), (first + fragment.rows - 1, shared.last_row)):
        begin, end = matrix.start + row * matrix.cols, matrix.start + (row + 1) * matrix.cols
        divided = any(begin < bound < end for bound in bounds)
        assert (slot is not None) == divided
        if divided:
            assert exchange[slot] == table[row].max()


def test_cut_slice_is_at_most_three_rectangles():
    """5 x 4, cut inside row 1 and inside row 3."""
    layout = ShardLayout.build([Matrix(0, 5, 4)], bounds=[0, 6, 14, 20], rank=1)
    assert layout.cut[0].rectangles() == [
        Rectangle(offset=0, row=0, col=2, rows=1, cols=2),
        Rectangle(offset=2, row=1, col=0, rows=1, cols=4),
        Rectangle(offset=6, row=2, col=0, rows=1, cols=2),
    ]
    assert layout.exchange_size == 1 + 1 + 4 + 2  # refusal, whole, columns, two divided rows


def test_zero_size_matrices_are_skipped():
    layout = ShardLayout.build([Matrix(0, 0, 4), Matrix(0, 2, 2)], bounds=[0, 4], rank=0)
    assert [fragment.matrix.rows for fragment in layout.whole] == [2]
    assert layout.exchange_size == 1
