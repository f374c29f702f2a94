// Plain loops: a step moves a few tens of megabytes where the network evaluation before it computes teraflops, so threads
// would save nothing that shows.
#include "edm_step.h"

namespace edm::cpu {

void churn(const float* x, const float* noise, float* x_hat, float* model_input, uint32_t size, ChurnCoefficients c) {
    for (uint32_t i = 0; i < size; ++i) {
        const float value = churned(c, x[i], noise[i]);
        x_hat[i] = value;
        model_input[i] = c.c_in * value;
    }
}

void churn_philox(const float* x, const int64_t* state, uint32_t draw, float* x_hat, float* model_input, uint32_t size,
                  ChurnCoefficients c) {
    for (uint32_t block = 0; 4 * block < size; ++block) {
        float noise[4];
        philox::normals(state, draw, block, noise);
        const uint32_t count = size - 4 * block < 4 ? size - 4 * block : 4;
        churn(x + 4 * block, noise, x_hat + 4 * block, model_input + 4 * block, count, c);
    }
}

void euler(const float* x_hat, const float* network, float* x, float* model_input, uint32_t rows, EulerCoefficients c,
           Conditioning conditioning) {
    const uint32_t width = conditioning.width();
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t column = 0; column < width; ++column) {
            const uint32_t i = row * width + column;
            const float value = inpainted(conditioning, edm::euler(c, x_hat[i], network[i]), row, column);
            x[i] = value;
            if (model_input) model_input[i] = c.c_in * value;
        }
    }
}

void heun(const float* x_hat, const float* x, const float* network, float* x_new, uint32_t rows, HeunCoefficients c,
          Conditioning conditioning) {
    const uint32_t width = conditioning.width();
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t column = 0; column < width; ++column) {
            const uint32_t i = row * width + column;
            x_new[i] = inpainted(conditioning, edm::heun(c, x_hat[i], x[i], network[i]), row, column);
        }
    }
}

}  // namespace edm::cpu
