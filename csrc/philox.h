// Standard normal noise from Philox 4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3"): element i of draw number `draw` is a function of the state alone, whichever thread computes it.
//
// The state {seed, pass} lies where the tensors lie. A replayed CUDA graph reads it anew each time, and whoever runs a pass
// advances `pass` beforehand; the draws within a pass are numbered by the host.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define PHILOX_INLINE __host__ __device__ inline
#else
#define PHILOX_INLINE inline
#endif

namespace philox {

struct Block {
    uint32_t word[4];
};

PHILOX_INLINE Block generate(Block counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * counter.word[0];
        const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.word[2];
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Elements 4 block .. 4 block + 3 of a draw. Box-Muller (1958): uniforms are (word + 1/2) / 2^32, so the logarithm is finite.
PHILOX_INLINE void normals(const int64_t* state, uint32_t draw, uint32_t block, float out[4]) {
    const uint64_t seed = static_cast<uint64_t>(state[0]), pass = static_cast<uint64_t>(state[1]);
    const Block random = generate({{block, draw, static_cast<uint32_t>(pass), static_cast<uint32_t>(pass >> 32)}},
                                  static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int pair = 0; pair < 2; ++pair) {
        const float u = (static_cast<float>(random.word[2 * pair]) + 0.5f) * 2.3283064e-10f;
        const float angle = (static_cast<float>(random.word[2 * pair + 1]) + 0.5f) * 1.46291808e-9f;  // 2 pi / 2^32
        const float radius = sqrtf(-2.0f * logf(u));
        out[2 * pair] = radius * cosf(angle);
        out[2 * pair + 1] = radius * sinf(angle);
    }
}

}  // namespace philox
