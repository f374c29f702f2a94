// Diffusion training on the CPU in float32: convolutions of five taps and their gradients by Winograd's products, F(13, 5).
//
//     forward            y[l] = sum_k w_k x[l + k - 2] + bias
//     input gradient     dx[l] = sum_k w_k^T dy[l + 2 - k], a convolution, too: of filters transposed and reversed
//     filter gradient    dw_k = sum_l dy[l] x[l + k - 2]^T, over the rows of all samples
//
// Activations are [B, L, C], filters [C_out, 5, C_in], row-major; rows beyond a sample are zeros. A tile of 13 rows takes 17
// products instead of 65 (winograd.h). Filters change at every step: their points, three and a half times as large, are made a
// block at a time, multiplied while they are in the cache, and never written to memory. So are the points of their gradients.
#pragma once

#include <cstdint>

namespace convolution {

// x [B, L, inputs] -> y [B, L, outputs]. The filters are [outputs, 5, inputs], or with `backward` [inputs, 5, outputs], and then
// the convolution is the input gradient's. The bias [outputs] may be null.
void convolve(const float* x, const float* filters, const float* bias, float* y, int64_t batch, int64_t length, int64_t inputs,
              int64_t outputs, bool backward, int num_threads);

// x [B, L, inputs], dy [B, L, outputs] -> the filters' gradient [outputs, 5, inputs].
void filter_gradient(const float* x, const float* dy, float* gradient, int64_t batch, int64_t length, int64_t inputs,
                     int64_t outputs, int num_threads);

}  // namespace convolution
