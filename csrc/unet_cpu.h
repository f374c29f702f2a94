// The U-Net's convolution blocks on the CPU: what stands around the matrix products of a Winograd convolution.
//
// A 5-tap convolution of rows x is computed two output rows at a time, F(2, 5) with the points 0, 1, -1, 2, -1/2 and infinity
// (Lavin & Gray 2016, arXiv 1509.09308): y = A^T [(G w) * (B^T x)], six products where the definition needs ten. `winograd_input`
// forms B^T x, a matrix product per point follows elsewhere, and `winograd_output` forms A^T, adds the bias, and finishes the
// block in the same pass: GroupNorm over (channels in group x rows), Mish, time bias, residual.
//
// Activations are bfloat16 [B, L, C] row-major; arithmetic is float32. Tiles are pairs of rows: T = ceil(L / 2).
#pragma once

#include <cstdint>

namespace unet {

using bfloat16 = uint16_t;

constexpr int POINTS = 6;
constexpr int GROUPS = 8;

// x [B, L, C] and skip [B, L, S] (null: none, S = 0), side by side -> v [POINTS, B T, C + S].
void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads);

// POINTS matrices m[p] [B T, C] -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time_bias [C] + residual [B, L, C]; null: left out.
void winograd_output(const bfloat16* const m[POINTS], const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int64_t batch, int64_t length,
                     int64_t channels, int num_threads);

}  // namespace unet
