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

constexpr float EPSILON = 1e-5f;  // of GroupNorm

ALWAYS_INLINE float widen(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to nearest even; NaN stays NaN.
ALWAYS_INLINE bfloat16 narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<bfloat16>(value != value ? 0x7fc0u : rounded);
}

// e^x to about 1e-7 relative for x <= 20, in operations that vectorise: 2^n by its bits, the rest by a polynomial.
ALWAYS_INLINE float exponential(float x) {
    x = std::max(x, -87.0f);
    const float n = std::floor(x * 1.44269504f + 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// y tanh(softplus(y)) = y (e^2 + 2e) / (e^2 + 2e + 2), e = exp(y); beyond 20 it is y to the last bit.
ALWAYS_INLINE float mish(float y) {
    const float e = exponential(std::min(y, 20.0f));
    const float n = e * (e + 2.0f);
    return y * (n / (n + 2.0f));
}

}  // namespace vectors
