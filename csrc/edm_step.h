// One step of the EDM sampler (Karras et al. 2022, arXiv 2206.00364, algorithm 2) for trajectories x laid out [B, H, D]
// row-major, observation columns first: D = O + A. Every formula exists once, here, for the CPU and the CUDA unit alike.
//
// The coefficients depend on the noise levels alone, which are host numbers: they are computed in double and rounded to
// float once, so that a step costs one or two fused multiply-adds an element and never reads a scalar from the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

#ifdef __CUDACC__
#define EDM_INLINE __host__ __device__ inline
#else
#define EDM_INLINE inline
#endif

namespace edm {

// The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x), F being the raw network.
struct Preconditioning {
    double c_skip, c_out, c_in;
};

inline Preconditioning precondition(double sigma, double sigma_data) {
    const double total = std::hypot(sigma, sigma_data);
    return {(sigma_data / total) * (sigma_data / total), sigma * sigma_data / total, 1.0 / total};
}

// The slope d = (x - D(x; sigma)) / sigma, sorted by its two inputs: d = on_x x + on_network F.
struct Slope {
    double on_x, on_network;
};

inline Slope slope(double sigma, double sigma_data) {
    const Preconditioning p = precondition(sigma, sigma_data);
    return {(1.0 - p.c_skip) / sigma, -p.c_out / sigma};
}

struct ChurnCoefficients {
    float on_noise, c_in;

    ChurnCoefficients(double sigma, double sigma_hat, double s_noise, double sigma_data)
        : on_noise(static_cast<float>(std::sqrt((sigma_hat - sigma) * (sigma_hat + sigma)) * s_noise)),
          c_in(static_cast<float>(precondition(sigma_hat, sigma_data).c_in)) {}
};

struct EulerCoefficients {
    float on_x_hat, on_network, c_in;

    EulerCoefficients(double sigma_hat, double sigma_next, double sigma_data) {
        const double step = sigma_next - sigma_hat;
        const Slope d = slope(sigma_hat, sigma_data);
        on_x_hat = static_cast<float>(1.0 + step * d.on_x);
        on_network = static_cast<float>(step * d.on_network);
        c_in = static_cast<float>(precondition(sigma_next, sigma_data).c_in);
    }
};

// x_hat + step (d + d') / 2 needs no copy of the first slope d: the Euler step left x = x_hat + step d behind, so the sum
// is (x_hat + x + step d') / 2. Where x was inpainted since, d is lost, but there the result is inpainted as well.
struct HeunCoefficients {
    float on_x, on_network;

    HeunCoefficients(double sigma_hat, double sigma_next, double sigma_data) {
        const double step = sigma_next - sigma_hat;
        const Slope d = slope(sigma_next, sigma_data);
        on_x = static_cast<float>(0.5 + 0.5 * step * d.on_x);
        on_network = static_cast<float>(0.5 * step * d.on_network);
    }
};

// One element, on the host or on the device.
EDM_INLINE float churned(const ChurnCoefficients& c, float x, float noise) { return x + c.on_noise * noise; }

EDM_INLINE float euler(const EulerCoefficients& c, float x_hat, float network) {
    return c.on_x_hat * x_hat + c.on_network * network;
}

EDM_INLINE float heun(const HeunCoefficients& c, float x_hat, float x, float network) {
    return 0.5f * x_hat + c.on_x * x + c.on_network * network;
}

// What overwrites a trajectory after each update: row 0's observation columns and every action column. A null pointer
// leaves that part as it is.
struct Conditioning {
    const float* first_observation;  // [B, O]
    const float* actions;            // [B, H, A]
    uint32_t horizon, observation_dim, action_dim;

    EDM_INLINE uint32_t width() const { return observation_dim + action_dim; }
};

// row counts over B x H. Elements are counted in 32 bits, because 64-bit divisions would outweigh the rest on a GPU; the
// callers refuse larger tensors.
EDM_INLINE float inpainted(const Conditioning& c, float value, uint32_t row, uint32_t column) {
    if (column >= c.observation_dim) {
        return c.actions ? c.actions[row * c.action_dim + (column - c.observation_dim)] : value;
    }
    if (c.first_observation && row % c.horizon == 0) {
        return c.first_observation[row / c.horizon * c.observation_dim + column];
    }
    return value;
}

// All pointers are float32 of the same device; rows = B x H. model_input may be null: then it is not written.
// churn_philox makes its own noise: draw number `draw` of the state {seed, pass}, which lies beside the tensors.
namespace cpu {
void churn(const float* x, const float* noise, float* x_hat, float* model_input, uint32_t size, ChurnCoefficients c);
void churn_philox(const float* x, const int64_t* state, uint32_t draw, float* x_hat, float* model_input, uint32_t size,
                  ChurnCoefficients c);
void euler(const float* x_hat, const float* network, float* x, float* model_input, uint32_t rows, EulerCoefficients c,
           Conditioning conditioning);
void heun(const float* x_hat, const float* x, const float* network, float* x_new, uint32_t rows, HeunCoefficients c,
          Conditioning conditioning);
}  // namespace cpu

// The same on a CUDA stream; they throw std::runtime_error with CUDA's words if a launch fails.
namespace cuda {
void churn(const float* x, const float* noise, float* x_hat, float* model_input, uint32_t size, ChurnCoefficients c,
           std::uintptr_t stream);
void churn_philox(const float* x, const int64_t* state, uint32_t draw, float* x_hat, float* model_input, uint32_t size,
                  ChurnCoefficients c, std::uintptr_t stream);
void euler(const float* x_hat, const float* network, float* x, float* model_input, uint32_t rows, EulerCoefficients c,
           Conditioning conditioning, std::uintptr_t stream);
void heun(const float* x_hat, const float* x, const float* network, float* x_new, uint32_t rows, HeunCoefficients c,
          Conditioning conditioning, std::uintptr_t stream);

// Empty if kernels can run, else why not on a device, -1 being the current one (no driver, a driver older than the
// runtime linked in, no device, no code for this one).
const char* obstacle(int device);
}  // namespace cuda

}  // namespace edm
