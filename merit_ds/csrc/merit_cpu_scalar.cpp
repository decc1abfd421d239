// SPDX-License-Identifier: Apache-2.0
// One element at a time, for every processor; a compiler may vectorise it as it likes.
#include "merit_cpu_kernel.h"

namespace merit::scalar {

struct U {
    uint32_t x;
    MERIT_INLINE explicit U(uint32_t value) : x(value) {}
};

struct F {
    float x;
    MERIT_INLINE explicit F(float value) : x(value) {}
};

MERIT_INLINE F operator+(F a, F b) { return F(a.x + b.x); }
MERIT_INLINE F operator-(F a, F b) { return F(a.x - b.x); }
MERIT_INLINE F operator*(F a, F b) { return F(a.x * b.x); }
MERIT_INLINE F operator/(F a, F b) { return F(a.x / b.x); }
MERIT_INLINE F square_root(F a) { return F(__builtin_sqrtf(a.x)); }
MERIT_INLINE bool operator>(F a, F b) { return a.x > b.x; }
MERIT_INLINE bool operator<(F a, F b) { return a.x < b.x; }
MERIT_INLINE F select(bool condition, F yes, F no) { return condition ? yes : no; }

MERIT_INLINE U bits(F a) { return U(float_bits(a.x)); }
MERIT_INLINE F from_bits(U a) { return F(bits_float(a.x)); }
MERIT_INLINE U operator&(U a, U b) { return U(a.x & b.x); }
MERIT_INLINE bool operator==(U a, U b) { return a.x == b.x; }
MERIT_INLINE U larger(U a, U b) { return a.x > b.x ? a : b; }
MERIT_INLINE U select(bool condition, U yes, U no) { return condition ? yes : no; }

struct Lanes {
    using F = scalar::F;
    using U = scalar::U;
    static constexpr int WIDTH = 1;

    MERIT_INLINE explicit Lanes(int64_t) {}

    MERIT_INLINE F load(const float* from) const { return F(*from); }
    MERIT_INLINE F load(const bfloat16* from) const { return F(from_bfloat16(from->bits)); }
    MERIT_INLINE F load(const float16* from) const { return F(from_float16(from->bits)); }
    MERIT_INLINE void store(float* to, F value) const { *to = value.x; }
    MERIT_INLINE void store(bfloat16* to, F value) const { to->bits = to_bfloat16(value.x); }
    MERIT_INLINE void store(float16* to, F value) const { to->bits = to_float16(value.x); }
    MERIT_INLINE U present(U value) const { return value; }

    MERIT_INLINE static U load_all(const uint32_t* from) { return U(*from); }
    MERIT_INLINE static void store_all(uint32_t* to, U value) { *to = value.x; }
    MERIT_INLINE static uint32_t largest(U value) { return value.x; }
};

}  // namespace merit::scalar

namespace merit {

const Kernels SCALAR = kernels<scalar::Lanes>("scalar");

}  // namespace merit
