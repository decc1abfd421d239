// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 to float32, exactly, and back, rounded to nearest, ties to even. Integer code, for hosts and
// devices alike; vector code may use its processor's instructions, which give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MERIT_BOTH __host__ __device__ __forceinline__
#else
#define MERIT_BOTH inline __attribute__((always_inline))
#endif

namespace merit {

MERIT_BOTH uint32_t float_bits(float value) {
    uint32_t result;
    memcpy(&result, &value, sizeof result);
    return result;
}

MERIT_BOTH float bits_float(uint32_t bits) {
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

MERIT_BOTH float from_bfloat16(uint16_t value) { return bits_float(uint32_t(value) << 16); }

MERIT_BOTH uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;  // rounding could carry a NaN into infinity
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

MERIT_BOTH float from_float16(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000u) << 16, magnitude = uint32_t(value & 0x7FFFu) << 13;
    if (magnitude >= 0x0F800000u) return bits_float(sign | magnitude | 0x7F800000u);  // infinity or NaN
    // The exponents' biases differ by 112; as a product this is right for subnormals as well.
    return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

MERIT_BOTH uint16_t to_float16(float value) {
    const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 leaves a multiple of 2^-24, float16's smallest step
        return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u));
    return uint16_t(sign | ((magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13));
}

}  // namespace merit
