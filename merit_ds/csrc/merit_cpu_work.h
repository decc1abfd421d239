// SPDX-License-Identifier: Apache-2.0
// How a batch is divided among threads: integers only. Positions count the elements of its tiles in the table's order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "merit_abi.h"

namespace merit {

struct Span {
    int64_t first;
    int64_t last;

    int64_t size() const { return last - first; }
};

// `tile` without what lies outside these rows and columns of it.
inline Tile cut(const Tile& tile, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    Tile part = tile;
    part.offset += row * tile.pitch + col;
    part.rows = rows;
    part.cols = cols;
    if (tile.row_slot >= 0) part.row_slot += row;
    if (tile.col_slot >= 0) part.col_slot += col;
    return part;
}

// A rectangle in blocks of about BLOCK elements: column strips from left to right, each from top to bottom.
class Blocks {
public:
    Blocks(const Tile& part, int64_t strip, int64_t block)
        : part_(part), strip_(strip), rows_(std::max<int64_t>(block / std::min(part.cols, strip), 1)) {}

    int64_t strips() const { return (part_.cols + strip_ - 1) / strip_; }
    int64_t in_strip() const { return (part_.rows + rows_ - 1) / rows_; }

    Tile strip(int64_t index) const {
        const int64_t col = index * strip_;
        return cut(part_, 0, part_.rows, col, std::min(strip_, part_.cols - col));
    }
    Tile block(const Tile& strip, int64_t index) const {
        const int64_t row = index * rows_;
        return cut(strip, row, std::min(rows_, strip.rows - row), 0, strip.cols);
    }

private:
    const Tile& part_;
    const int64_t strip_, rows_;
};

// The batch's elements, without those of tensors that have no gradient.
class Work {
public:
    explicit Work(const Batch& batch) : batch(batch) {
        starts_.reserve(batch.tile_count + 1);
        starts_.push_back(0);
        for (int64_t i = 0; i < batch.tile_count; ++i) {
            const Tile& tile = batch.tiles[i];
            const bool skipped = batch.tensors[tile.tensor].grad == nullptr;
            starts_.push_back(starts_.back() + (skipped ? 0 : tile.rows * tile.cols));
        }
    }

    const Batch& batch;

    Span all() const { return {0, starts_.back()}; }

    // The last tile that begins at this position or before.
    int64_t tile_at(int64_t position) const {
        return std::upper_bound(starts_.begin(), starts_.end() - 1, position) - starts_.begin() - 1;
    }

    // Piece number `index` of about equal `pieces`, which end between rows, or between cache lines of a single row.
    Span piece(Span span, int64_t index, int64_t pieces) const {
        return {boundary(span, index, pieces), boundary(span, index + 1, pieces)};
    }

    // The rectangle that a span has in common with a tile; spans end where `piece` and `fragments` let them.
    Tile part(int64_t index, Span span) const {
        const Tile& tile = batch.tiles[index];
        if (starts_[index] == starts_[index + 1]) return cut(tile, 0, 0, 0, 0);
        const int64_t first = std::max(span.first - starts_[index], int64_t(0));
        const int64_t last = std::min(span.last, starts_[index + 1]) - starts_[index];
        if (tile.rows == 1) return cut(tile, 0, 1, first, last - first);
        return cut(tile, first / tile.cols, (last - first) / tile.cols, 0, tile.cols);
    }

    // Runs of tiles of one matrix, and of tiles without a trust ratio.
    template <class Visit>
    void fragments(Visit visit) const {
        for (int64_t first = 0, last = 0; first < batch.tile_count; first = last) {
            const Tile& tile = batch.tiles[first];
            const bool scaled = tile.whole_slot >= 0;
            while (last < batch.tile_count && batch.tiles[last].whole_slot == tile.whole_slot &&
                   !(scaled && batch.tiles[last].tensor != tile.tensor))
                ++last;
            visit(Span{starts_[first], starts_[last]}, scaled);
        }
    }

private:
    static constexpr int64_t LINE = 16;  // elements of a cache line, as float32

    int64_t boundary(Span span, int64_t index, int64_t pieces) const {
        if (index == pieces) return span.last;
        const int64_t position = span.first + int64_t(__int128(span.size()) * index / pieces);
        const int64_t tile = tile_at(position), inside = position - starts_[tile];
        return position - inside % (batch.tiles[tile].rows == 1 ? LINE : batch.tiles[tile].cols);
    }

    std::vector<int64_t> starts_;
};

}  // namespace merit
