// SPDX-License-Identifier: Apache-2.0
// Maxima of |w| and |u|: from a thread's registers to the buffer in global memory, and from there to ratios.
#pragma once
#include "merit_cuda_tile.h"

namespace merit {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;
constexpr int PAIR = 2;  // one of |w|, one of |u|
static_assert(THREADS == PAIR * TILE_SPAN, "each thread has one of a tile's column maxima");
static_assert(sizeof(Maxima) == PAIR * sizeof(uint32_t), "maxima are read as pairs of words");

// A pair in registers.
struct Found {
    Bits weight, update;

    MERIT_DEVICE uint32_t word(int which) const { return which == 0 ? weight.value : update.value; }
    MERIT_DEVICE void raise(const Found& other) {
        weight = larger(weight, other.weight);
        update = larger(update, other.update);
    }
};

MERIT_DEVICE Bits warp_maximum(Bits mine) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        mine = larger(mine, Bits(__shfl_xor_sync(0xFFFFFFFFu, mine.value, distance)));
    return mine;
#else
    return Bits(__reduce_max_sync(0xFFFFFFFFu, mine.value));
#endif
}

MERIT_DEVICE Found warp_maximum(const Found& mine) { return {warp_maximum(mine.weight), warp_maximum(mine.update)}; }

MERIT_DEVICE int lane() { return int(threadIdx.x) % LANES; }
MERIT_DEVICE int warp() { return int(threadIdx.x) / LANES; }

// Each warp's maxima, until the block combines them.
struct Scratch {
    uint32_t cols[WARPS][PAIR * TILE_SPAN];
    uint32_t whole[WARPS][PAIR];
};

MERIT_DEVICE uint32_t largest(const uint32_t* words, int pitch) {
    Bits result;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) result = larger(result, Bits(words[i * pitch]));
    return result.value;
}

// The block's column and whole maxima into `maxima`, by as few atomics as there are words.
template <bool FOURS>
MERIT_DEVICE void combine(Scratch& scratch, const Found (&cols)[LANE_WIDTH], const Place<FOURS>& place,
                          const Tile& tile, uint32_t* maxima) {
    const bool has_axes = tile.col_slot >= 0;
    Found whole;
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; ++i) {
        whole.raise(cols[i]);
        if (has_axes)
            for (int which = 0; which < PAIR; ++which)
                scratch.cols[warp()][PAIR * (LANE_WIDTH * lane() + i) + which] = cols[i].word(which);
    }
    whole = warp_maximum(whole);
    if (lane() < PAIR) scratch.whole[warp()][lane()] = whole.word(lane());
    __syncthreads();
    const int thread = int(threadIdx.x), which = thread % PAIR;
    if (has_axes) {
        const int col = place.column(thread / PAIR / LANE_WIDTH, thread / PAIR % LANE_WIDTH);
        if (col >= 0 && col < place.cols)
            atomicMax(&maxima[PAIR * (tile.col_slot + col) + which], largest(&scratch.cols[0][thread], PAIR * TILE_SPAN));
    }
    if (thread < PAIR) atomicMax(&maxima[PAIR * tile.whole_slot + which], largest(&scratch.whole[0][thread], PAIR));
}

MERIT_DEVICE Bits ratio_at(const uint32_t* maxima, int64_t slot) {
    return ratio<Number>(Bits(maxima[PAIR * slot]), Bits(maxima[PAIR * slot + 1]));
}

}  // namespace merit
