// SPDX-License-Identifier: Apache-2.0
// Where a CUDA thread's elements lie in a tile, and how they get from memory to registers and back.
#pragma once
#include <type_traits>

#include "merit_cuda_number.h"
#include "merit_float16.h"

namespace merit {

constexpr int LANES = 32;       // of a warp
constexpr int LANE_WIDTH = 4;   // elements of a row that one thread works on: 16 bytes of float32
constexpr int TILE_SPAN = LANES * LANE_WIDTH;
constexpr int TILE_ROWS = 64;

// Four elements as they are stored, read and written by one instruction.
template <class T>
struct alignas(LANE_WIDTH * sizeof(T)) Four {
    T element[LANE_WIDTH];
};

// A tensor, and a thread's elements of it while they are in registers.
template <class T>
struct Stream {
    T* base;
    Four<std::remove_const_t<T>> four;

    MERIT_DEVICE explicit Stream(T* tensor) : base(tensor), four{} {}
};

template <class T>
MERIT_DEVICE bool aligned(const void* base) {
    return reinterpret_cast<uintptr_t>(base) % sizeof(Four<T>) == 0;
}

MERIT_DEVICE Number decoded(float stored, int32_t) { return Number(stored); }
MERIT_DEVICE Number decoded(uint16_t stored, int32_t dtype) {
    return Number(dtype == BFLOAT16 ? from_bfloat16(stored) : from_float16(stored));
}

template <class T>
MERIT_DEVICE T encoded(Number number, int32_t dtype);
template <>
MERIT_DEVICE float encoded<float>(Number number, int32_t) {
    return number.value;
}
template <>
MERIT_DEVICE uint16_t encoded<uint16_t>(Number number, int32_t dtype) {
    return dtype == BFLOAT16 ? to_bfloat16(number.value) : to_float16(number.value);
}

// A thread's elements in one row of a tile. FOURS: neighbours, of which four may be read at once.
template <bool FOURS>
struct Run {
    static constexpr int STRIDE = FOURS ? 1 : LANES;

    int64_t at;      // of the first one in the tensor
    int from, cols;  // the first one's column, and how many columns there are: what lies outside is not the tile's

    MERIT_DEVICE bool holds(int element) const { return unsigned(from + element * STRIDE) < unsigned(cols); }

    // One branch for all, so that every load is under way before the first is waited for. What lies outside is zero.
    template <class... T>
    MERIT_DEVICE void read(Stream<T>&... streams) const {
        if (inside()) (read_four(streams), ...);
        else (read_each(streams), ...);
    }

    template <class... T>
    MERIT_DEVICE void write(const Stream<T>&... streams) const {
        if (inside()) (write_four(streams), ...);
        else (write_each(streams), ...);
    }

  private:
    MERIT_DEVICE bool inside() const { return FOURS && from >= 0 && from + LANE_WIDTH <= cols; }

    template <class T>
    MERIT_DEVICE void read_four(Stream<T>& stream) const {
        stream.four = *reinterpret_cast<const Four<std::remove_const_t<T>>*>(stream.base + at);
    }

    template <class T>
    MERIT_DEVICE void read_each(Stream<T>& stream) const {
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i)
            stream.four.element[i] = holds(i) ? stream.base[at + i * STRIDE] : std::remove_const_t<T>(0);
    }

    template <class T>
    MERIT_DEVICE void write_four(const Stream<T>& stream) const {
        *reinterpret_cast<Four<T>*>(stream.base + at) = stream.four;
    }

    template <class T>
    MERIT_DEVICE void write_each(const Stream<T>& stream) const {
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i)
            if (holds(i)) stream.base[at + i * STRIDE] = stream.four.element[i];
    }
};

// How the threads of a block share out a tile: a warp takes every eighth row, a lane four columns of it.
//
// In fours, lane 0 begins up to three columns before the tile, so that every lane's address is a multiple of four:
//
//     tile at offset 4k + 3          |. . . x|x x x x|x x x x|x x . .|
//     lanes                           0       1       2       3
//
// Where the addresses do not allow that in all rows of all tensors, the lanes read single elements side by side, the
// warp's 128 columns in four reads. A long row without maxima of its own is folded into rows of 128 columns.
template <bool FOURS>
struct Place {
    int rows, cols;
    int fold;  // columns from a row to the next: 128 in a folded row, 0 else
    int phase;
    int64_t offset, pitch;

    MERIT_DEVICE explicit Place(const Tile& tile)
        : rows(int(tile.rows)), cols(int(tile.cols)), fold(0), phase(FOURS ? int(tile.offset % LANE_WIDTH) : 0),
          offset(tile.offset), pitch(tile.pitch) {
        if (rows == 1 && tile.col_slot < 0) {
            rows = (phase + cols + TILE_SPAN - 1) / TILE_SPAN;
            pitch = fold = TILE_SPAN;
        }
    }

    // Column of a lane's element, in the first row; outside [0, cols) where it has none.
    MERIT_DEVICE int column(int lane, int element) const {
        return FOURS ? lane * LANE_WIDTH + element - phase : lane + element * LANES;
    }

    MERIT_DEVICE Run<FOURS> run(int lane, int row) const {
        const int first = column(lane, 0);
        return {offset + row * pitch + first, first + row * fold, cols};
    }
};

// Whether every row of a tile can be read in fours, in tensors whose addresses are multiples of it.
MERIT_DEVICE bool rows_aligned(const Tile& tile) { return tile.rows == 1 || tile.pitch % LANE_WIDTH == 0; }

}  // namespace merit
