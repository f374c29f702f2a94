// The U-Net's convolution blocks on the CPU: what stands around the matrix products of a Winograd convolution.
//
// A 5-tap convolution of rows x is computed a tile of output rows at a time: y = A^T [(G w) * (B^T x)] (Lavin & Gray 2016, arXiv
// 1509.09308), five rows with 10 products in bfloat16 and thirteen with 17 in float32, where the definition needs 25 and 65.
// `winograd_input` forms B^T x, a matrix product per point follows elsewhere, and `winograd_output` forms A^T, adds the bias, and
// finishes the block in the same pass: GroupNorm over (channels in group x rows), Mish, time bias, residual.
//
// kernels/winograd.py says what the points are and why, and transforms the filters; winograd.h has B^T and A^T.
//
// Activations are [B, L, C] row-major, Element is bfloat16 or float; arithmetic is float32. There are T = ceil(L / tile) tiles a
// sample.
#pragma once

#include <cstdint>

namespace unet {

using bfloat16 = uint16_t;

// x [B, L, C] and skip [B, L, S] (null: none, S = 0), side by side -> v [points, B T, C + S].
template <typename Element>
void winograd_input(const Element* x, const Element* skip, Element* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads);

// A matrix m[p] [B T, C] for each point -> y [B, L, C] = mish(group_norm(A^T m + bias)) + time_bias [C] + residual [B, L, C];
// null: left out.
template <typename Element>
void winograd_output(const Element* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const Element* residual, Element* y, int64_t batch, int64_t length, int64_t channels,
                     int num_threads);

}  // namespace unet
