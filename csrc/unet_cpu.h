// The U-Net's convolution blocks on the CPU: what stands around the matrix products of a Winograd convolution.
//
// A 5-tap convolution of rows x is computed five output rows at a time: y = A^T [(G w) * (B^T x)] (Lavin & Gray 2016, arXiv
// 1509.09308) with 10 products, where the definition needs 25. `winograd_input` forms B^T x, a matrix product per point follows
// elsewhere, and `winograd_output` forms A^T, adds the bias, and finishes the block in the same pass: GroupNorm over (channels in
// group x rows), Mish, time bias, residual.
//
// kernels/winograd.py says what the points are and why, and transforms the filters.
//
// Activations are bfloat16 [B, L, C] row-major; arithmetic is float32. There are T = ceil(L / 5) tiles a sample.
#pragma once

#include <cstdint>

namespace unet {

using bfloat16 = uint16_t;

constexpr int GROUPS = 8;
constexpr int TILE = 5, SPAN = 9, POINTS = 10;  // output rows, input rows and products of a tile

// x [B, L, C] and skip [B, L, S] (null: none, S = 0), side by side -> v [POINTS, B T, C + S].
void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads);

// POINTS matrices m[p] [B T, C] -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time_bias [C] + residual [B, L, C]; null: left out.
void winograd_output(const bfloat16* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int64_t batch, int64_t length, int64_t channels,
                     int num_threads);

}  // namespace unet
