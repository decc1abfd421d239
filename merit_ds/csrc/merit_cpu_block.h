// SPDX-License-Identifier: Apache-2.0
// What the CPU's driver hands to the kernel of a vector width.
#pragma once
#include <cstdint>

#include "merit_abi.h"

namespace merit {

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

// Columns of a matrix that a thread goes through together. What it notes of them must stay in its L2 cache; to read
// whole rows, end to end in memory, is worth more than the L1 cache: 3072 columns in two strips took a fifth longer.
constexpr int64_t STRIP = 8192;

struct Columns {
    alignas(64) uint32_t weight[STRIP];  // maxima of the first pass
    alignas(64) uint32_t update[STRIP];
    alignas(64) uint32_t ratio[STRIP];  // for the second
};

// `rows` runs of `cols` elements, each `pitch` after the last, as one thread has them in hand.
struct Block {
    void* weight;  // these four: of the first element
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    int32_t weight_dtype;
    int32_t grad_dtype;
    int64_t pitch;
    int64_t rows;
    int64_t cols;
    const Hyper* hyper;
    float* update;           // [rows, cols], u: the first pass leaves it to the second; null: compute it again
    Maxima* row_maxima;      // of the first row, shared with other threads; null: a vector, or unscaled
    Columns* columns;        // this thread's own
    Maxima whole_maxima;     // this thread's own; raised by the first pass
    uint32_t whole_ratio;
};

struct Kernels {
    const char* name;
    void (*first_pass)(Block& block);
    void (*column_ratios)(const Maxima* maxima, int64_t count, Columns& columns);
    void (*second_pass)(const Block& block);
};

extern const Kernels SCALAR, AVX2, AVX512;

// Raises a maximum that other threads raise as well. Most attempts find a larger value and write nothing.
inline __attribute__((always_inline)) void raise(uint32_t* maximum, uint32_t value) {
    uint32_t seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(maximum, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

}  // namespace merit
