// SPDX-License-Identifier: Apache-2.0
// MERIT's formula for one element (arXiv 2508.20577, algorithm 1), once for every device and vector width.
//
// F is a float or a vector of floats, U the unsigned integers of the same width. Their operations must round as IEEE
// 754 says, each for itself: a fused multiply-add would give other bits on another device or in a vector's tail.
// What F and U must offer: + - * / on F; square_root(F); bits(F) and from_bits(U); U & U; larger(U, U);
// select(condition, yes, no); comparisons that give a condition; F(float) and U(uint32_t), the same in every lane.
#pragma once
#include <cstdint>

#include "merit_abi.h"

#ifdef __CUDACC__
#define MERIT_INLINE __device__ __forceinline__
#else
#define MERIT_INLINE inline __attribute__((always_inline))
#endif

namespace merit {

constexpr uint32_t CLEAR_SIGN = 0x7FFFFFFFu;
constexpr uint32_t ONE = 0x3F800000u;
// Above every float's bits: a ratio that is not defined wins each maximum and is told from the result.
constexpr uint32_t UNDEFINED = 0xFFFFFFFFu;

// Hyper in every lane.
template <class F>
struct Scalars {
    F beta1, one_minus_beta1, beta2, one_minus_beta2, eps_inside, eps_outside, weight_decay, lr, clip, minus_clip;

    MERIT_INLINE explicit Scalars(const Hyper& h)
        : beta1(h.beta1), one_minus_beta1(h.one_minus_beta1), beta2(h.beta2), one_minus_beta2(h.one_minus_beta2),
          eps_inside(h.eps_inside), eps_outside(h.eps_outside), weight_decay(h.weight_decay), lr(h.lr), clip(h.clip),
          minus_clip(-h.clip) {}
};

template <class F>
MERIT_INLINE void moments(F& m, F& v, F g, const Scalars<F>& h) {
    m = m * h.beta1 + g * h.one_minus_beta1;
    v = v * h.beta2 + g * g * h.one_minus_beta2;
}

// u. One of the two eps is zero, and adding zero to v >= 0 or to its root changes nothing.
template <class F>
MERIT_INLINE F update(F w, F m, F v, const Scalars<F>& h) {
    return m / (square_root(v + h.eps_inside) + h.eps_outside) + w * h.weight_decay;
}

// max|w| / max|u| of a row, a column or the whole, as bits; UNDEFINED where one of them is zero.
template <class F, class U>
MERIT_INLINE U ratio(U weight, U update) {
    const U quotient = bits(from_bits(weight) / from_bits(update)) & U(CLEAR_SIGN);  // a NaN may carry a sign
    return select((weight == U(0u)) | (update == U(0u)), U(UNDEFINED), quotient);
}

// s from the three ratios of an element; 1 where one is not defined. A vector has its whole ratio in place of all.
template <class F, class U>
MERIT_INLINE F trust(U row, U col, U whole) {
    const U largest = larger(larger(row, col), whole);
    return from_bits(select(largest == U(UNDEFINED), U(ONE), largest));
}

// The new weight.
template <class F>
MERIT_INLINE F stepped(F w, F u, F s, const Scalars<F>& h) {
    const F scaled = u * s;
    const F below = select(scaled > h.clip, h.clip, scaled);  // a NaN passes both comparisons as itself
    const F clipped = select(below < h.minus_clip, h.minus_clip, below);
    return w - clipped * h.lr;
}

}  // namespace merit
