// One thread an element, one kernel a step: bound by memory, each tensor crosses the bus once.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "edm_step.h"

namespace edm::cuda {
namespace {

constexpr uint32_t kThreads = 256;

__global__ void churn_kernel(const float* __restrict__ x, const float* __restrict__ noise, float* __restrict__ x_hat,
                             float* __restrict__ model_input, uint32_t size, ChurnCoefficients c) {
    const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= size) return;
    const float value = churned(c, x[i], noise[i]);
    x_hat[i] = value;
    model_input[i] = c.c_in * value;
}

// One thread for four elements, which is what one block of random words gives.
__global__ void churn_philox_kernel(const float* __restrict__ x, const int64_t* __restrict__ state, uint32_t draw,
                                    float* __restrict__ x_hat, float* __restrict__ model_input, uint32_t size,
                                    ChurnCoefficients c) {
    const uint32_t block = blockIdx.x * kThreads + threadIdx.x;
    if (4 * block >= size) return;
    float noise[4];
    philox::normals(state, draw, block, noise);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t i = 4 * block + k;
        if (i < size) {
            const float value = churned(c, x[i], noise[k]);
            x_hat[i] = value;
            model_input[i] = c.c_in * value;
        }
    }
}

__global__ void euler_kernel(const float* __restrict__ x_hat, const float* __restrict__ network, float* __restrict__ x,
                             float* __restrict__ model_input, uint32_t size, EulerCoefficients c,
                             Conditioning conditioning) {
    const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= size) return;
    const uint32_t width = conditioning.width();
    const float value = inpainted(conditioning, edm::euler(c, x_hat[i], network[i]), i / width, i % width);
    x[i] = value;
    if (model_input) model_input[i] = c.c_in * value;
}

__global__ void heun_kernel(const float* __restrict__ x_hat, const float* __restrict__ x,
                            const float* __restrict__ network, float* __restrict__ x_new, uint32_t size,
                            HeunCoefficients c, Conditioning conditioning) {
    const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= size) return;
    const uint32_t width = conditioning.width();
    x_new[i] = inpainted(conditioning, edm::heun(c, x_hat[i], x[i], network[i]), i / width, i % width);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), uint32_t size, std::uintptr_t stream, Arguments... arguments) {
    if (size == 0) return;  // a grid of no blocks is an error
    const uint32_t blocks = (size - 1) / kThreads + 1;
    kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("the EDM step could not be launched: ") + cudaGetErrorString(error));
    }
}

}  // namespace

void churn(const float* x, const float* noise, float* x_hat, float* model_input, uint32_t size, ChurnCoefficients c,
           std::uintptr_t stream) {
    launch(churn_kernel, size, stream, x, noise, x_hat, model_input, size, c);
}

void churn_philox(const float* x, const int64_t* state, uint32_t draw, float* x_hat, float* model_input, uint32_t size,
                  ChurnCoefficients c, std::uintptr_t stream) {
    launch(churn_philox_kernel, size / 4 + (size % 4 != 0), stream, x, state, draw, x_hat, model_input, size, c);
}

void euler(const float* x_hat, const float* network, float* x, float* model_input, uint32_t rows, EulerCoefficients c,
           Conditioning conditioning, std::uintptr_t stream) {
    const uint32_t size = rows * conditioning.width();
    launch(euler_kernel, size, stream, x_hat, network, x, model_input, size, c, conditioning);
}

void heun(const float* x_hat, const float* x, const float* network, float* x_new, uint32_t rows, HeunCoefficients c,
          Conditioning conditioning, std::uintptr_t stream) {
    const uint32_t size = rows * conditioning.width();
    launch(heun_kernel, size, stream, x_hat, x, network, x_new, size, c, conditioning);
}

const char* obstacle(int device) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
    int devices = 0, current = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) error = cudaGetDevice(&current);
    const bool elsewhere = error == cudaSuccess && device >= 0 && device != current;  // a device that is set gets a context
    if (elsewhere) error = cudaSetDevice(device);
    cudaFuncAttributes attributes;  // there are none where the binary has no code for the card
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, churn_kernel);
    if (elsewhere) cudaSetDevice(current);
    cudaGetLastError();  // what failed here is not the next launch's
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace edm::cuda
