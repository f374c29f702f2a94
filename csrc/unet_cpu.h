// The U-Net's convolution blocks on the CPU: what stands around the matrix products of a Winograd convolution.
//
// A 5-tap convolution of rows x is computed a tile of m output rows at a time, F(m, 5) (Lavin & Gray 2016, arXiv 1509.09308):
// y = A^T [(G w) * (B^T x)] with m + 4 products where the definition needs 5 m. `winograd_input` forms B^T x, a matrix product per
// point follows elsewhere, and `winograd_output` forms A^T, adds the bias, and finishes the block in the same pass: GroupNorm over
// (channels in group x rows), Mish, time bias, residual.
//
//     m   points                              products a row
//     2   0, 3/2, -3/2, 2/3, -2/3, inf        3
//     4   0, 1, -1, 2, -2, 1/2, -1/2, inf     2
//
// Among all sets these points amplify the rounding of products of independent rows least (2.3 and 4.4 times; a search over sets).
//
// Activations are bfloat16 [B, L, C] row-major; arithmetic is float32. There are T = ceil(L / m) tiles a sample, P = m + 4 points.
#pragma once

#include <cstdint>

namespace unet {

using bfloat16 = uint16_t;

constexpr int GROUPS = 8;

// x [B, L, C] and skip [B, L, S] (null: none, S = 0), side by side -> v [P, B T, C + S]. `tile` is m, 2 or 4.
void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int tile, int64_t batch, int64_t length,
                    int64_t channels, int64_t skip_channels, int num_threads);

// P matrices m[p] [B T, C] -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time_bias [C] + residual [B, L, C]; null: left out.
void winograd_output(const bfloat16* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int tile, int64_t batch, int64_t length,
                     int64_t channels, int num_threads);

}  // namespace unet
