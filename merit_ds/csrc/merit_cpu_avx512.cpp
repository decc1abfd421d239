// SPDX-License-Identifier: Apache-2.0
// Sixteen elements at a time with AVX-512 (F, BW and VL); masks keep loads and stores within a row.
#include <immintrin.h>

#include "merit_cpu_kernel.h"

namespace merit::avx512 {

struct U {
    __m512i x;
    MERIT_INLINE explicit U(uint32_t value) : x(_mm512_set1_epi32(int(value))) {}
    MERIT_INLINE U(__m512i value) : x(value) {}
};

struct F {
    __m512 x;
    MERIT_INLINE explicit F(float value) : x(_mm512_set1_ps(value)) {}
    MERIT_INLINE F(__m512 value) : x(value) {}
};

MERIT_INLINE F operator+(F a, F b) { return _mm512_add_ps(a.x, b.x); }
MERIT_INLINE F operator-(F a, F b) { return _mm512_sub_ps(a.x, b.x); }
MERIT_INLINE F operator*(F a, F b) { return _mm512_mul_ps(a.x, b.x); }
MERIT_INLINE F operator/(F a, F b) { return _mm512_div_ps(a.x, b.x); }
MERIT_INLINE F square_root(F a) { return _mm512_sqrt_ps(a.x); }
MERIT_INLINE __mmask16 operator>(F a, F b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
MERIT_INLINE __mmask16 operator<(F a, F b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }
MERIT_INLINE F select(__mmask16 condition, F yes, F no) { return _mm512_mask_blend_ps(condition, no.x, yes.x); }

MERIT_INLINE U bits(F a) { return _mm512_castps_si512(a.x); }
MERIT_INLINE F from_bits(U a) { return _mm512_castsi512_ps(a.x); }
MERIT_INLINE U operator&(U a, U b) { return _mm512_and_si512(a.x, b.x); }
MERIT_INLINE __mmask16 operator==(U a, U b) { return _mm512_cmpeq_epi32_mask(a.x, b.x); }
MERIT_INLINE U larger(U a, U b) { return _mm512_max_epu32(a.x, b.x); }
MERIT_INLINE U select(__mmask16 condition, U yes, U no) { return _mm512_mask_blend_epi32(condition, no.x, yes.x); }

MERIT_INLINE __m256i rounded_to_bfloat16(F a) {
    const __m512i bits = _mm512_castps_si512(a.x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7FC0)));
}

// The first so many of sixteen.
struct Lanes {
    using F = avx512::F;
    using U = avx512::U;
    static constexpr int WIDTH = 16;
    const __mmask16 mask;

    MERIT_INLINE explicit Lanes(int64_t left) : mask(left < WIDTH ? (1u << left) - 1 : 0xFFFFu) {}

    MERIT_INLINE F load(const float* from) const { return _mm512_maskz_loadu_ps(mask, from); }
    MERIT_INLINE F load(const bfloat16* from) const {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
    }
    MERIT_INLINE F load(const float16* from) const {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
    }
    MERIT_INLINE void store(float* to, F value) const { _mm512_mask_storeu_ps(to, mask, value.x); }
    MERIT_INLINE void store(bfloat16* to, F value) const {
        _mm256_mask_storeu_epi16(to, mask, rounded_to_bfloat16(value));
    }
    MERIT_INLINE void store(float16* to, F value) const {
        _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    MERIT_INLINE U present(U value) const { return _mm512_maskz_mov_epi32(mask, value.x); }

    MERIT_INLINE static U load_all(const uint32_t* from) { return _mm512_loadu_si512(from); }
    MERIT_INLINE static void store_all(uint32_t* to, U value) { _mm512_storeu_si512(to, value.x); }
    MERIT_INLINE static uint32_t largest(U value) { return _mm512_reduce_max_epu32(value.x); }
};

}  // namespace merit::avx512

namespace merit {

const Kernels AVX512 = kernels<avx512::Lanes>("avx512");

}  // namespace merit
