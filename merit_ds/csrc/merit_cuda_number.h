// SPDX-License-Identifier: Apache-2.0
// The F and U of merit_math.h for one CUDA thread: a float and its bits. Arithmetic goes through intrinsics that round
// to nearest and that the compiler never fuses.
#pragma once
#include "merit_math.h"

#define MERIT_DEVICE __device__ __forceinline__

namespace merit {

struct Bits {
    uint32_t value;

    MERIT_DEVICE explicit Bits(uint32_t bits = 0) : value(bits) {}
};

struct Number {
    float value;

    MERIT_DEVICE explicit Number(float number = 0.0f) : value(number) {}
};

MERIT_DEVICE Number operator+(Number a, Number b) { return Number(__fadd_rn(a.value, b.value)); }
MERIT_DEVICE Number operator-(Number a, Number b) { return Number(__fsub_rn(a.value, b.value)); }
MERIT_DEVICE Number operator*(Number a, Number b) { return Number(__fmul_rn(a.value, b.value)); }
MERIT_DEVICE Number operator/(Number a, Number b) { return Number(__fdiv_rn(a.value, b.value)); }
MERIT_DEVICE Number square_root(Number a) { return Number(__fsqrt_rn(a.value)); }
MERIT_DEVICE bool operator<(Number a, Number b) { return a.value < b.value; }
MERIT_DEVICE bool operator>(Number a, Number b) { return a.value > b.value; }

MERIT_DEVICE Bits bits(Number a) { return Bits(__float_as_uint(a.value)); }
MERIT_DEVICE Number from_bits(Bits a) { return Number(__uint_as_float(a.value)); }
MERIT_DEVICE bool operator==(Bits a, Bits b) { return a.value == b.value; }
MERIT_DEVICE Bits operator&(Bits a, Bits b) { return Bits(a.value & b.value); }
MERIT_DEVICE Bits larger(Bits a, Bits b) { return a.value > b.value ? a : b; }

template <class T>
MERIT_DEVICE T select(bool condition, T yes, T no) {
    return condition ? yes : no;
}

}  // namespace merit
