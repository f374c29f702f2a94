// Raw addresses in, nothing back: the extension knows no tensor type, so it builds without torch and survives its updates.
// It checks nothing; dydiff.kernels.edm, .unet_cpu, .matrix_cpu, .training_cpu and .convolution_cpu check everything and call it.
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "convolution_cpu.h"
#include "edm_step.h"
#include "matrix_cpu.h"
#include "threads.h"
#include "training_cpu.h"
#include "unet_cpu.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

float* pointer(Address address) { return reinterpret_cast<float*>(address); }
unet::bfloat16* halves(Address address) { return reinterpret_cast<unet::bfloat16*>(address); }

// Binds one unit's operations. Stream is empty for the CPU and one more trailing address for CUDA.
template <typename... Stream, typename Churn, typename ChurnPhilox, typename Euler, typename Heun>
void bind(py::module_ m, Churn churn, ChurnPhilox churn_philox, Euler euler, Heun heun) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("churn", [churn](Address x, Address noise, Address x_hat, Address model_input, uint32_t size, double sigma,
                           double sigma_hat, double s_noise, double sigma_data, Stream... stream) {
        churn(pointer(x), pointer(noise), pointer(x_hat), pointer(model_input), size,
              edm::ChurnCoefficients(sigma, sigma_hat, s_noise, sigma_data), stream...);
    }, release);
    m.def("churn_philox", [churn_philox](Address x, Address state, uint32_t draw, Address x_hat, Address model_input,
                                         uint32_t size, double sigma, double sigma_hat, double s_noise, double sigma_data,
                                         Stream... stream) {
        churn_philox(pointer(x), reinterpret_cast<const int64_t*>(state), draw, pointer(x_hat), pointer(model_input), size,
                     edm::ChurnCoefficients(sigma, sigma_hat, s_noise, sigma_data), stream...);
    }, release);
    m.def("euler", [euler](Address x_hat, Address network, Address x, Address model_input, uint32_t rows,
                           double sigma_hat, double sigma_next, double sigma_data, Address first_observation,
                           Address actions, uint32_t horizon, uint32_t observation_dim, uint32_t action_dim,
                           Stream... stream) {
        euler(pointer(x_hat), pointer(network), pointer(x), pointer(model_input), rows,
              edm::EulerCoefficients(sigma_hat, sigma_next, sigma_data),
              edm::Conditioning{pointer(first_observation), pointer(actions), horizon, observation_dim, action_dim},
              stream...);
    }, release);
    m.def("heun", [heun](Address x_hat, Address x, Address network, Address x_new, uint32_t rows, double sigma_hat,
                         double sigma_next, double sigma_data, Address first_observation, Address actions,
                         uint32_t horizon, uint32_t observation_dim, uint32_t action_dim, Stream... stream) {
        heun(pointer(x_hat), pointer(x), pointer(network), pointer(x_new), rows,
             edm::HeunCoefficients(sigma_hat, sigma_next, sigma_data),
             edm::Conditioning{pointer(first_observation), pointer(actions), horizon, observation_dim, action_dim},
             stream...);
    }, release);
}

template <typename Element>
void bind_unet(py::module_ m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    const auto elements = [](Address address) { return reinterpret_cast<Element*>(address); };
    m.def("winograd_input", [=](Address x, Address skip, Address v, int64_t batch, int64_t length, int64_t channels,
                                int64_t skip_channels, int num_threads) {
        unet::winograd_input<Element>(elements(x), elements(skip), elements(v), batch, length, channels, skip_channels,
                                      num_threads);
    }, release);
    m.def("winograd_output", [=](const std::vector<Address>& m, Address bias, Address norm_weight, Address norm_bias,
                                 Address time_bias, Address residual, Address y, int64_t batch, int64_t length,
                                 int64_t channels, int num_threads) {
        std::vector<const Element*> points;
        for (const Address point : m) points.push_back(elements(point));
        unet::winograd_output<Element>(points.data(), pointer(bias), pointer(norm_weight), pointer(norm_bias),
                                       pointer(time_bias), elements(residual), elements(y), batch, length, channels, num_threads);
    }, release);
}

template <typename Element>
void bind_norm_mish(py::module_ m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    const auto elements = [](Address address) { return reinterpret_cast<Element*>(address); };
    m.def("norm_mish", [=](Address x, Address weight, Address bias, Address y, Address statistics, int64_t batch,
                           int64_t length, int64_t channels, int num_threads) {
        training::norm_mish<Element>(elements(x), pointer(weight), pointer(bias), elements(y), pointer(statistics), batch,
                                     length, channels, num_threads);
    }, release);
    m.def("norm_mish_backward", [=](Address x, Address dy, Address weight, Address bias, Address statistics, Address dx,
                                    Address dweight, Address dbias, int64_t batch, int64_t length, int64_t channels,
                                    int num_threads) {
        training::norm_mish_backward<Element>(elements(x), elements(dy), pointer(weight), pointer(bias), pointer(statistics),
                                              elements(dx), pointer(dweight), pointer(dbias), batch, length, channels,
                                              num_threads);
    }, release);
}

void bind_training(py::module_ m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    bind_norm_mish<training::bfloat16>(m.def_submodule("bfloat16"));
    bind_norm_mish<float>(m.def_submodule("float32"));
    m.def("adam_average", [](Address p, Address m, Address v, Address average, Address gradient, Address low_gradient,
                             Address low_copy, int64_t count, float one_minus_beta_1, float beta_2, float one_minus_beta_2,
                             float epsilon, float step_size, float root_correction_2, float rate, float limit,
                             int num_threads) {
        training::adam_average(pointer(p), pointer(m), pointer(v), pointer(average), pointer(gradient), halves(low_gradient),
                               halves(low_copy), count,
                               {one_minus_beta_1, beta_2, one_minus_beta_2, epsilon, step_size, root_correction_2, rate, limit},
                               num_threads);
    }, release);
}

void bind_convolution(py::module_ m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("convolve", [](Address x, Address filters, Address bias, Address y, int64_t batch, int64_t length, int64_t inputs,
                         int64_t outputs, bool backward, int num_threads) {
        convolution::convolve(pointer(x), pointer(filters), pointer(bias), pointer(y), batch, length, inputs, outputs, backward,
                              num_threads);
    }, release);
    m.def("filter_gradient", [](Address x, Address dy, Address gradient, int64_t batch, int64_t length, int64_t inputs,
                                int64_t outputs, int num_threads) {
        convolution::filter_gradient(pointer(x), pointer(dy), pointer(gradient), batch, length, inputs, outputs, num_threads);
    }, release);
}

void bind_matrix(py::module_ m) {
    m.def("lanes", [] { return matrix::lanes(); });
    m.def("multiply", [](Address x, Address w, Address bias, Address y, int64_t count, int64_t rows, int64_t depth,
                         int64_t columns, int num_threads) {
        matrix::multiply(pointer(x), pointer(w), pointer(bias), pointer(y), count, rows, depth, columns, num_threads);
    }, py::call_guard<py::gil_scoped_release>());
}

void bind_threads(py::module_ m) {
    m.def("join", [](Address parallel, Address index, Address count) {
        threads::pool.parallel = reinterpret_cast<decltype(threads::Pool::parallel)>(parallel);
        threads::pool.index = reinterpret_cast<decltype(threads::Pool::index)>(index);
        threads::pool.count = reinterpret_cast<decltype(threads::Pool::count)>(count);
    });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Sampler steps, U-Net blocks and training on raw addresses; dydiff.kernels.edm, .unet_cpu, .matrix_cpu, "
              ".training_cpu and .convolution_cpu are the interface.";
    bind_threads(m.def_submodule("threads"));
    py::module_ unet = m.def_submodule("unet");
    bind_unet<unet::bfloat16>(unet.def_submodule("bfloat16"));
    bind_unet<float>(unet.def_submodule("float32"));
    bind_training(m.def_submodule("training"));
    bind_convolution(m.def_submodule("convolution"));
    bind_matrix(m.def_submodule("matrix"));
    bind<>(m.def_submodule("cpu"), edm::cpu::churn, edm::cpu::churn_philox, edm::cpu::euler, edm::cpu::heun);
#ifdef DYDIFF_WITH_CUDA
    py::module_ cuda = m.def_submodule("cuda");
    bind<Address>(cuda, edm::cuda::churn, edm::cuda::churn_philox, edm::cuda::euler, edm::cuda::heun);
    cuda.def("obstacle", &edm::cuda::obstacle);
#endif
}
