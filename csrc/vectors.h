// Arithmetic that the CPU units share: bfloat16 held in 16 bits, Mish in operations that vectorise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// One binary for every x86-64: the loader picks the widest vectors that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace vectors {

using bfloat16 = uint16_t;

ALWAYS_INLINE float widen(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

ALWAYS_INLINE float widen(float value) { return value; }

template <typename Element>
ALWAYS_INLINE Element narrow(float value) {
    return value;
}

// Rounds to nearest even; NaN stays NaN.
template <>
ALWAYS_INLINE bfloat16 narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<bfloat16>(value != value ? 0x7fc0u : rounded);
}

// e^x to about 1e-7 relative for -87 <= x <= 20, and as at the nearer end beyond, in operations that vectorise: 2^(n + f).
ALWAYS_INLINE float exponential(float x) {
    constexpr float LOG2_E = 1.44269504f, SHIFT = 12582912.0f;  // 1.5 2^23: a sum with it is a whole number, in its last bits
    // As integers floats are in order, negative ones backwards; a minimum of floats would be three instructions.
    int32_t ordered;
    std::memcpy(&ordered, &x, sizeof ordered);
    ordered = std::min(ordered, 0x41a00000);  // 20
    const uint32_t clamped = std::min(static_cast<uint32_t>(ordered), 0xc2ae0000u);  // -87
    std::memcpy(&x, &clamped, sizeof x);
    const float shifted = x * LOG2_E + SHIFT;
    const float f = x * LOG2_E - (shifted - SHIFT);
    float power = 1.32765e-3f;  // minimax of 2^f / power - 1 on [-1/2, 1/2]
    power = power * f + 9.67554e-3f;
    power = power * f + 5.550713e-2f;
    power = power * f + 2.402212e-1f;
    power = power * f + 6.93147e-1f;
    power = power * f + 1.0f;
    uint32_t n, bits;
    std::memcpy(&n, &shifted, sizeof n);
    std::memcpy(&bits, &power, sizeof bits);
    bits += n << 23;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// y tanh(softplus(y)) = y (e^2 + 2e) / (e^2 + 2e + 2), e = exp(y); beyond 20 it is y to the last bit.
ALWAYS_INLINE float mish(float y) {
    const float e = exponential(y);
    const float n = e * (e + 2.0f);
    return y * (n / (n + 2.0f));
}

}  // namespace vectors
