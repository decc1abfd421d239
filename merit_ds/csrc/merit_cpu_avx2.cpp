// SPDX-License-Identifier: Apache-2.0
// Eight elements at a time with AVX2 and F16C; the last few of a row go through a copy on the stack.
#include <immintrin.h>

#include "merit_cpu_kernel.h"

namespace merit::avx2 {

struct U {
    __m256i x;
    MERIT_INLINE explicit U(uint32_t value) : x(_mm256_set1_epi32(int(value))) {}
    MERIT_INLINE U(__m256i value) : x(value) {}
};

struct F {
    __m256 x;
    MERIT_INLINE explicit F(float value) : x(_mm256_set1_ps(value)) {}
    MERIT_INLINE F(__m256 value) : x(value) {}
};

// All bits of a lane, or none.
struct Condition {
    __m256i x;
    MERIT_INLINE Condition(__m256i value) : x(value) {}
    MERIT_INLINE Condition(__m256 value) : x(_mm256_castps_si256(value)) {}
};

MERIT_INLINE F operator+(F a, F b) { return _mm256_add_ps(a.x, b.x); }
MERIT_INLINE F operator-(F a, F b) { return _mm256_sub_ps(a.x, b.x); }
MERIT_INLINE F operator*(F a, F b) { return _mm256_mul_ps(a.x, b.x); }
MERIT_INLINE F operator/(F a, F b) { return _mm256_div_ps(a.x, b.x); }
MERIT_INLINE F square_root(F a) { return _mm256_sqrt_ps(a.x); }
MERIT_INLINE Condition operator>(F a, F b) { return _mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ); }
MERIT_INLINE Condition operator<(F a, F b) { return _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ); }
MERIT_INLINE Condition operator|(Condition a, Condition b) { return _mm256_or_si256(a.x, b.x); }

MERIT_INLINE U bits(F a) { return _mm256_castps_si256(a.x); }
MERIT_INLINE F from_bits(U a) { return _mm256_castsi256_ps(a.x); }
MERIT_INLINE U operator&(U a, U b) { return _mm256_and_si256(a.x, b.x); }
MERIT_INLINE Condition operator==(U a, U b) { return _mm256_cmpeq_epi32(a.x, b.x); }
MERIT_INLINE U larger(U a, U b) { return _mm256_max_epu32(a.x, b.x); }
MERIT_INLINE U select(Condition condition, U yes, U no) { return _mm256_blendv_epi8(no.x, yes.x, condition.x); }
MERIT_INLINE F select(Condition condition, F yes, F no) {
    return _mm256_blendv_ps(no.x, yes.x, _mm256_castsi256_ps(condition.x));
}

MERIT_INLINE F load(const float* from) { return _mm256_loadu_ps(from); }
MERIT_INLINE F load(const bfloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
MERIT_INLINE F load(const float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

MERIT_INLINE void store(float* to, F value) { _mm256_storeu_ps(to, value.x); }
MERIT_INLINE void store(bfloat16* to, F value) {
    const __m256i bits = _mm256_castps_si256(value.x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value.x, value.x, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}
MERIT_INLINE void store(float16* to, F value) {
    const __m128i halves = _mm256_cvtps_ph(value.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}

// The first so many of eight.
struct Lanes {
    using F = avx2::F;
    using U = avx2::U;
    static constexpr int WIDTH = 8;
    const int64_t count;

    MERIT_INLINE explicit Lanes(int64_t left) : count(left < WIDTH ? left : WIDTH) {}

    template <class T>
    MERIT_INLINE F load(const T* from) const {
        if (count == WIDTH) return avx2::load(from);
        T padded[WIDTH] = {};
        for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
        return avx2::load(padded);
    }
    template <class T>
    MERIT_INLINE void store(T* to, F value) const {
        if (count == WIDTH) return avx2::store(to, value);
        T padded[WIDTH];
        avx2::store(padded, value);
        for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
    }
    MERIT_INLINE U present(U value) const {
        const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_and_si256(value.x, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), order));
    }

    MERIT_INLINE static U load_all(const uint32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    MERIT_INLINE static void store_all(uint32_t* to, U value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.x);
    }
    MERIT_INLINE static uint32_t largest(U value) {
        __m128i half = _mm_max_epu32(_mm256_castsi256_si128(value.x), _mm256_extracti128_si256(value.x, 1));
        half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
        half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
        return uint32_t(_mm_cvtsi128_si32(half));
    }
};

}  // namespace merit::avx2

namespace merit {

const Kernels AVX2 = kernels<avx2::Lanes>("avx2");

}  // namespace merit
