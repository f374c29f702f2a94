#include "training_cpu.h"

#include <limits>

#include "threads.h"
#include "vectors.h"

namespace training {
namespace {

using namespace vectors;
using threads::parallel;

// With fewer elements than this, a thread costs more than it saves.
constexpr int64_t ELEMENTS_A_THREAD = 1 << 15;

int enough_threads(int64_t elements, int num_threads) {
    return static_cast<int>(std::min<int64_t>(num_threads, 1 + elements / ELEMENTS_A_THREAD));
}

// With e = exp(z) and n = e^2 + 2e, mish' = n / (n + 2) + 4 z e (e + 1) / (n + 2)^2. Beyond 20, where the
// exponential is held, the second term is below rounding.
ALWAYS_INLINE float mish_slope(float z) {
    const float e = exponential(z);
    const float n = e * (e + 2.0f), inverse = 1.0f / (n + 2.0f);
    return n * inverse + 4.0f * z * (e * inverse) * ((e + 1.0f) * inverse);
}

// Sums over one group's rows of the deviations from `center` and of their squares, one accumulator a channel.
template <typename Element>
FOR_EACH_CPU void accumulate(const Element* x, int64_t stride, float center, float* sum, float* square, int64_t rows,
                             int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = x + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
            const float deviation = widen(value[c]) - center;
            sum[c] += deviation;
            square[c] += deviation * deviation;
        }
    }
}

template <typename Element>
FOR_EACH_CPU void finish_rows(const Element* x, const float* scale, const float* shift, Element* y, int64_t stride, int64_t rows,
                              int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = x + row * stride;
        Element* result = y + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) result[c] = narrow<Element>(mish(widen(value[c]) * scale[c] + shift[c]));
    }
}

// dz of one group's rows into `slopes` [L, width]; sums of dz and of dz x_hat over the rows, one a channel.
template <typename Element>
FOR_EACH_CPU void differentiate_mish(const Element* x, const Element* dy, int64_t stride, float mean, float inverse,
                                     const float* weight, const float* bias, float* slopes, float* sum, float* product,
                                     int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element *value = x + row * stride, *gradient = dy + row * stride;
        float* slope = slopes + row * width;
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
            const float normal = (widen(value[c]) - mean) * inverse;
            const float dz = widen(gradient[c]) * mish_slope(normal * weight[c] + bias[c]);
            slope[c] = dz;
            sum[c] += dz;
            product[c] += dz * normal;
        }
    }
}

template <typename Element>
FOR_EACH_CPU void differentiate_norm(const Element* x, const float* slopes, int64_t stride, float mean, float inverse,
                                     const float* weight, float mean_slope, float mean_product, Element* dx, int64_t rows,
                                     int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = x + row * stride;
        const float* slope = slopes + row * width;
        Element* result = dx + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
            const float normal = (widen(value[c]) - mean) * inverse;
            result[c] = narrow<Element>(inverse * (slope[c] * weight[c] - mean_slope - normal * mean_product));
        }
    }
}

ALWAYS_INLINE float repaired(float g, float limit) {
    constexpr float largest = std::numeric_limits<float>::max();
    g = g > largest ? limit : g;
    g = g < -largest ? -limit : g;
    return g == g ? g : 0.0f;
}

struct Pointers {
    float *p, *m, *v, *average;
};

ALWAYS_INLINE float updated(const Pointers& at, int64_t i, float gradient, const Update& u) {
    const float g = repaired(gradient, u.limit);
    const float m = at.m[i] + u.one_minus_beta_1 * (g - at.m[i]);
    const float v = u.beta_2 * at.v[i] + u.one_minus_beta_2 * g * g;
    const float p = at.p[i] - u.step_size * m / (std::sqrt(v) / u.root_correction_2 + u.epsilon);
    at.m[i] = m;
    at.v[i] = v;
    at.p[i] = p;
    at.average[i] += u.rate * (p - at.average[i]);
    return p;
}

FOR_EACH_CPU
void update_range(const Pointers at, const float* gradient, int64_t first, int64_t last, const Update u) {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) updated(at, i, gradient[i], u);
}

FOR_EACH_CPU
void update_range(const Pointers at, const bfloat16* gradient, bfloat16* copy, int64_t first, int64_t last, const Update u) {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) copy[i] = narrow<bfloat16>(updated(at, i, widen(gradient[i]), u));
}

}  // namespace

template <typename Element>
void norm_mish(const Element* x, const float* weight, const float* bias, Element* y, float* statistics, int64_t batch,
               int64_t length, int64_t channels, int num_threads) {
    const int64_t width = channels / GROUPS;
    parallel(batch * GROUPS, enough_threads(batch * length * channels, num_threads), [=](int64_t begin, int64_t end) {
        std::vector<float> sum(width), square(width), scale(width), shift(width);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t from = item % GROUPS * width, at = item / GROUPS * length * channels + from;
            // Deviations from one of the values, so that a large common offset does not eat the variance.
            const float center = widen(x[at]);
            std::fill(sum.begin(), sum.end(), 0.0f);
            std::fill(square.begin(), square.end(), 0.0f);
            accumulate(x + at, channels, center, sum.data(), square.data(), length, width);
            double total = 0, total_square = 0;
            for (int64_t c = 0; c < width; ++c) total += sum[c], total_square += square[c];
            const double count = static_cast<double>(length * width), offset = total / count;
            const double variance = std::max(total_square / count - offset * offset, 0.0);
            const double mean = center + offset, inverse = 1.0 / std::sqrt(variance + EPSILON);
            statistics[2 * item] = static_cast<float>(mean);
            statistics[2 * item + 1] = static_cast<float>(inverse);
            for (int64_t c = 0; c < width; ++c) {
                scale[c] = static_cast<float>(weight[from + c] * inverse);
                shift[c] = static_cast<float>(bias[from + c] - mean * weight[from + c] * inverse);
            }
            finish_rows(x + at, scale.data(), shift.data(), y + at, channels, length, width);
        }
    });
}

template <typename Element>
void norm_mish_backward(const Element* x, const Element* dy, const float* weight, const float* bias, const float* statistics,
                        Element* dx, float* dweight, float* dbias, int64_t batch, int64_t length, int64_t channels,
                        int num_threads) {
    const int64_t width = channels / GROUPS;
    const float count = static_cast<float>(length * width);
    // A thread takes whole groups: the sums over samples then belong to one thread.
    parallel(GROUPS, enough_threads(batch * length * channels, num_threads), [=](int64_t begin, int64_t end) {
        std::vector<float> slopes(length * width), sum(width), product(width);
        for (int64_t group = begin; group < end; ++group) {
            const int64_t from = group * width;
            const float *scale = weight + from, *shift = bias + from;
            std::fill_n(dweight + from, width, 0.0f);
            std::fill_n(dbias + from, width, 0.0f);
            for (int64_t sample = 0; sample < batch; ++sample) {
                const int64_t at = sample * length * channels + from;
                const float mean = statistics[2 * (sample * GROUPS + group)];
                const float inverse = statistics[2 * (sample * GROUPS + group) + 1];
                std::fill(sum.begin(), sum.end(), 0.0f);
                std::fill(product.begin(), product.end(), 0.0f);
                differentiate_mish(x + at, dy + at, channels, mean, inverse, scale, shift, slopes.data(), sum.data(),
                                   product.data(), length, width);
                double total = 0, total_product = 0;
                for (int64_t c = 0; c < width; ++c) {
                    total += scale[c] * sum[c];
                    total_product += scale[c] * product[c];
                    dbias[from + c] += sum[c];
                    dweight[from + c] += product[c];
                }
                differentiate_norm(x + at, slopes.data(), channels, mean, inverse, scale, static_cast<float>(total) / count,
                                   static_cast<float>(total_product) / count, dx + at, length, width);
            }
        }
    });
}

void adam_average(float* p, float* m, float* v, float* average, const float* gradient, const bfloat16* low_gradient,
                  bfloat16* low_copy, int64_t count, Update update, int num_threads) {
    const Pointers at{p, m, v, average};
    parallel(count, enough_threads(count, num_threads), [=](int64_t first, int64_t last) {
        if (low_gradient) {
            update_range(at, low_gradient, low_copy, first, last, update);
        } else {
            update_range(at, gradient, first, last, update);
        }
    });
}

template void norm_mish(const bfloat16*, const float*, const float*, bfloat16*, float*, int64_t, int64_t, int64_t, int);
template void norm_mish(const float*, const float*, const float*, float*, float*, int64_t, int64_t, int64_t, int);
template void norm_mish_backward(const bfloat16*, const bfloat16*, const float*, const float*, const float*, bfloat16*, float*,
                                 float*, int64_t, int64_t, int64_t, int);
template void norm_mish_backward(const float*, const float*, const float*, const float*, const float*, float*, float*, float*,
                                 int64_t, int64_t, int64_t, int);

}  // namespace training
