// Diffusion training on the CPU: what stands around the matrix products of a training step.
//
//     norm_mish      y = mish(z), z = weight x_hat + bias, x_hat = (x - mean) / sqrt(variance + 1e-5),
//                    mean and variance over (channels in group x rows) of one sample
//     its gradient   dz = dy mish'(z);  dweight = sum dz x_hat;  dbias = sum dz, over samples and rows
//                    dx = (weight dz - <weight dz> - x_hat <weight dz x_hat>) / sqrt(variance + 1e-5), <> the group's mean
//     adam_average   g: NaN -> 0, +-inf -> +-limit
//                    m += (1 - beta_1) (g - m);  v = beta_2 v + (1 - beta_2) g^2
//                    p -= step_size m / (sqrt(v) / root_correction_2 + epsilon);  average += rate (p - average)
//
// Activations are [B, L, C] row-major, Element is bfloat16 or float; weights and their gradients are float32, as arithmetic is. Adam
// is Kingma & Ba 2014, arXiv 1412.6980: step_size = lr / (1 - beta_1^n), root_correction_2 = sqrt(1 - beta_2^n) at update n.
#pragma once

#include <cstdint>

namespace training {

using bfloat16 = uint16_t;

// x [B, L, C] -> y [B, L, C] and statistics [B, 8, 2]: mean and 1 / sqrt(variance + 1e-5).
template <typename Element>
void norm_mish(const Element* x, const float* weight, const float* bias, Element* y, float* statistics, int64_t batch,
               int64_t length, int64_t channels, int num_threads);

// dy [B, L, C] -> dx [B, L, C], dweight [C], dbias [C].
template <typename Element>
void norm_mish_backward(const Element* x, const Element* dy, const float* weight, const float* bias, const float* statistics,
                        Element* dx, float* dweight, float* dbias, int64_t batch, int64_t length, int64_t channels,
                        int num_threads);

struct Update {
    // 1 - beta is taken in double: in float 1 - 0.999 is off by 5e-5 of itself.
    float one_minus_beta_1, beta_2, one_minus_beta_2, epsilon, step_size, root_correction_2;
    float rate;   // how far the average moves to the new weights
    float limit;  // what an infinite gradient becomes
};

// One pass over `count` weights p, moments m and v, and the average. The gradient comes in float32, or in bfloat16 together
// with a bfloat16 copy of the weights to refresh; the other pair is null.
void adam_average(float* p, float* m, float* v, float* average, const float* gradient, const bfloat16* low_gradient,
                  bfloat16* low_copy, int64_t count, Update update, int num_threads);

}  // namespace training
