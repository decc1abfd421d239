// SPDX-License-Identifier: Apache-2.0
// Both passes over a block of a matrix: the loops, written once for all vector widths.
//
// `Lanes` says how many elements go together and how they are loaded and stored. Each of its variants is a type of its
// own, compiled in a file of its own with that file's instruction set: nothing here may become a function that the
// linker could share between them. So there are only templates over `Lanes` and functions that are always inlined.
#pragma once
#include "merit_cpu_block.h"
#include "merit_float16.h"
#include "merit_math.h"

#ifdef __FAST_MATH__
#error "results must be the same on every machine: do not compile this with -ffast-math"
#endif

namespace merit {

// How many elements before their use memory is asked for: a processor's own prefetcher stops at the end of a page.
constexpr int64_t AHEAD = 256;

// From a row's start: AHEAD elements on, which may be in the block's next row.
MERIT_INLINE int64_t place_ahead(int64_t col, const Block& block) {
    const int64_t ahead = col + AHEAD;
    return ahead < block.cols ? ahead : ahead - block.cols + block.pitch;
}

template <class Lanes, class W, class G>
void first_pass(Block& block) {
    using F = typename Lanes::F;
    using U = typename Lanes::U;
    const Scalars<F> h(*block.hyper);
    const int64_t cols = block.cols;
    uint32_t *const col_weight = block.columns->weight, *const col_update = block.columns->update;
    for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t start = row * block.pitch;
        const W* const weights = static_cast<const W*>(block.weight) + start;
        const G* const grads = static_cast<const G*>(block.grad) + start;
        float *const exp_avg = block.exp_avg + start, *const exp_avg_sq = block.exp_avg_sq + start;
        float* const updates = block.update ? block.update + row * cols : nullptr;
        U row_weight(0u), row_update(0u);
        for (int64_t col = 0; col < cols; col += Lanes::WIDTH) {
            const Lanes lanes(cols - col);
            const int64_t ahead = place_ahead(col, block);
            if constexpr (Lanes::WIDTH > 1) {
                __builtin_prefetch(weights + ahead);
                __builtin_prefetch(grads + ahead, 0, 2);  // not into L1: the others are used again
                __builtin_prefetch(exp_avg + ahead, 1);
                __builtin_prefetch(exp_avg_sq + ahead, 1);
            }
            const F w = lanes.load(weights + col);
            F m = lanes.load(exp_avg + col), v = lanes.load(exp_avg_sq + col);
            moments(m, v, lanes.load(grads + col), h);
            lanes.store(exp_avg + col, m);
            lanes.store(exp_avg_sq + col, v);
            const F u = update(w, m, v, h);
            if (updates) lanes.store(updates + col, u);
            const U abs_weight = bits(w) & U(CLEAR_SIGN);
            const U abs_update = lanes.present(bits(u)) & U(CLEAR_SIGN);  // beyond the end 0 / 0 may be NaN
            row_weight = larger(row_weight, abs_weight);
            row_update = larger(row_update, abs_update);
            Lanes::store_all(col_weight + col, larger(Lanes::load_all(col_weight + col), abs_weight));
            Lanes::store_all(col_update + col, larger(Lanes::load_all(col_update + col), abs_update));
        }
        const Maxima found{Lanes::largest(row_weight), Lanes::largest(row_update)};
        if (block.row_maxima) {
            raise(&block.row_maxima[row].weight, found.weight);
            raise(&block.row_maxima[row].update, found.update);
        }
        if (found.weight > block.whole_maxima.weight) block.whole_maxima.weight = found.weight;
        if (found.update > block.whole_maxima.update) block.whole_maxima.update = found.update;
    }
}

template <class Lanes, class W>
void second_pass(const Block& block) {
    using F = typename Lanes::F;
    using U = typename Lanes::U;
    const Scalars<F> h(*block.hyper);
    const U whole_ratio(block.whole_ratio);
    const int64_t cols = block.cols;
    const uint32_t* const col_ratio = block.columns->ratio;
    for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t start = row * block.pitch;
        W* const weights = static_cast<W*>(block.weight) + start;
        const float *const exp_avg = block.exp_avg + start, *const exp_avg_sq = block.exp_avg_sq + start;
        const float* const updates = block.update ? block.update + row * cols : nullptr;
        const Maxima* const maxima = block.row_maxima ? block.row_maxima + row : nullptr;
        const U row_ratio = maxima ? ratio<F, U>(U(maxima->weight), U(maxima->update)) : whole_ratio;
        for (int64_t col = 0; col < cols; col += Lanes::WIDTH) {
            const Lanes lanes(cols - col);
            const int64_t ahead = place_ahead(col, block);
            if constexpr (Lanes::WIDTH > 1) {
                __builtin_prefetch(weights + ahead, 1);
                __builtin_prefetch((updates ? updates : exp_avg) + ahead);
                if (!updates) __builtin_prefetch(exp_avg_sq + ahead);
            }
            const F w = lanes.load(weights + col);
            const F u = updates ? lanes.load(updates + col)
                                : update(w, lanes.load(exp_avg + col), lanes.load(exp_avg_sq + col), h);
            const F s = trust<F, U>(row_ratio, Lanes::load_all(col_ratio + col), whole_ratio);
            lanes.store(weights + col, stepped(w, u, s, h));
        }
    }
}

template <class Lanes>
void column_ratios(const Maxima* maxima, int64_t count, Columns& columns) {
    using F = typename Lanes::F;
    using U = typename Lanes::U;
    for (int64_t col = 0; col < count; ++col) {
        columns.weight[col] = maxima[col].weight;
        columns.update[col] = maxima[col].update;
    }
    for (int64_t col = 0; col < count; col += Lanes::WIDTH) {
        const U weight = Lanes::load_all(columns.weight + col), update = Lanes::load_all(columns.update + col);
        Lanes::store_all(columns.ratio + col, ratio<F, U>(weight, update));
    }
}

template <class Lanes, class W>
void first_pass_by_grad(Block& block) {
    switch (block.grad_dtype) {
        case BFLOAT16: return first_pass<Lanes, W, bfloat16>(block);
        case FLOAT16: return first_pass<Lanes, W, float16>(block);
        default: return first_pass<Lanes, W, float>(block);
    }
}

template <class Lanes>
void first_pass_by_dtype(Block& block) {
    switch (block.weight_dtype) {
        case BFLOAT16: return first_pass_by_grad<Lanes, bfloat16>(block);
        case FLOAT16: return first_pass_by_grad<Lanes, float16>(block);
        default: return first_pass_by_grad<Lanes, float>(block);
    }
}

template <class Lanes>
void second_pass_by_dtype(const Block& block) {
    switch (block.weight_dtype) {
        case BFLOAT16: return second_pass<Lanes, bfloat16>(block);
        case FLOAT16: return second_pass<Lanes, float16>(block);
        default: return second_pass<Lanes, float>(block);
    }
}

// What a variant offers.
template <class Lanes>
constexpr Kernels kernels(const char* name) {
    return {name, first_pass_by_dtype<Lanes>, column_ratios<Lanes>, second_pass_by_dtype<Lanes>};
}

}  // namespace merit
