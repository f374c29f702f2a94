#include "training_cpu.h"

#include <limits>

#include "group_norm.h"
#include "threads.h"
#include "vectors.h"

namespace training {
namespace {

using namespace vectors;
using group_norm::GROUPS;
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

template <typename Element>
FOR_EACH_CPU void finish_rows(const Element* x, const float* scale, const float* shift, Element* y, int64_t stride, int64_t rows,
                              int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = x + row * stride;
        Element* result = y + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) result[c] = narrow<Element>(mish(widen(value[c]) * scale[c] + shift[c]));
    }
}

// dz of one sample's rows into `slopes` [L, columns]; sums of dz and of dz x_hat over the rows, one a channel.
template <typename Element>
FOR_EACH_CPU void differentiate_mish(const Element* x, const Element* dy, int64_t stride, const float* mean, const float* inverse,
                                     const float* weight, const float* bias, float* slopes, float* sum, float* product,
                                     int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element *value = x + row * stride, *gradient = dy + row * stride;
        float* slope = slopes + row * columns;
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) {
            const float normal = (widen(value[c]) - mean[c]) * inverse[c];
            const float dz = widen(gradient[c]) * mish_slope(normal * weight[c] + bias[c]);
            slope[c] = dz;
            sum[c] += dz;
            product[c] += dz * normal;
        }
    }
}

template <typename Element>
FOR_EACH_CPU void differentiate_norm(const Element* x, const float* slopes, int64_t stride, const float* mean,
                                     const float* inverse, const float* weight, const float* mean_slope,
                                     const float* mean_product, Element* dx, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = x + row * stride;
        const float* slope = slopes + row * columns;
        Element* result = dx + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) {
            const float normal = (widen(value[c]) - mean[c]) * inverse[c];
            result[c] = narrow<Element>(inverse[c] * (slope[c] * weight[c] - mean_slope[c] - normal * mean_product[c]));
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

// Both directions take some groups together: a row of one may be too short for vectors, and that of all too long for the cache.
constexpr int64_t COLUMNS_TOGETHER = 64;

int64_t groups_together(int64_t width) { return std::max<int64_t>(1, COLUMNS_TOGETHER / width); }

template <typename Element>
void norm_mish(const Element* x, const float* weight, const float* bias, Element* y, float* statistics, int64_t batch,
               int64_t length, int64_t channels, int num_threads) {
    const int64_t width = channels / GROUPS;
    parallel(batch * GROUPS, enough_threads(batch * length * channels, num_threads), [=](int64_t begin, int64_t end) {
        std::vector<float> center(channels), sum(channels), square(channels), scale(channels), shift(channels);
        for (int64_t item = begin, groups; item < end; item += groups) {
            const int64_t from = item % GROUPS * width, at = item / GROUPS * length * channels + from;
            groups = std::min({groups_together(width), GROUPS - item % GROUPS, end - item});
            const int64_t columns = groups * width;
            for (int64_t c = 0; c < columns; ++c) center[c] = widen(x[at + c]);
            std::fill(sum.begin(), sum.end(), 0.0f);
            std::fill(square.begin(), square.end(), 0.0f);
            group_norm::accumulate(x + at, channels, center.data(), sum.data(), square.data(), length, columns);
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t first = group * width;
                const auto [mean, inverse] = group_norm::merge(&center[first], &sum[first], &square[first], length, width);
                statistics[2 * (item + group)] = static_cast<float>(mean);
                statistics[2 * (item + group) + 1] = static_cast<float>(inverse);
                for (int64_t c = first; c < first + width; ++c) {
                    scale[c] = static_cast<float>(weight[from + c] * inverse);
                    shift[c] = static_cast<float>(bias[from + c] - mean * weight[from + c] * inverse);
                }
            }
            finish_rows(x + at, scale.data(), shift.data(), y + at, channels, length, columns);
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
        const int64_t most = std::min(end - begin, groups_together(width)) * width;
        std::vector<float> slopes(length * most), sum(most), product(most), mean(most), inverse(most), mean_slope(most),
            mean_product(most);
        for (int64_t group = begin, groups; group < end; group += groups) {
            groups = std::min(groups_together(width), end - group);
            const int64_t from = group * width, columns = groups * width;
            const float *scale = weight + from, *shift = bias + from;
            std::fill_n(dweight + from, columns, 0.0f);
            std::fill_n(dbias + from, columns, 0.0f);
            for (int64_t sample = 0; sample < batch; ++sample) {
                const int64_t at = sample * length * channels + from;
                for (int64_t c = 0; c < columns; ++c) {
                    const float* of_group = statistics + 2 * (sample * GROUPS + group + c / width);
                    mean[c] = of_group[0];
                    inverse[c] = of_group[1];
                }
                std::fill(sum.begin(), sum.end(), 0.0f);
                std::fill(product.begin(), product.end(), 0.0f);
                differentiate_mish(x + at, dy + at, channels, mean.data(), inverse.data(), scale, shift, slopes.data(),
                                   sum.data(), product.data(), length, columns);
                for (int64_t first = 0; first < columns; first += width) {
                    double total = 0, total_product = 0;
                    for (int64_t c = first; c < first + width; ++c) {
                        total += scale[c] * sum[c];
                        total_product += scale[c] * product[c];
                        dbias[from + c] += sum[c];
                        dweight[from + c] += product[c];
                    }
                    std::fill_n(&mean_slope[first], width, static_cast<float>(total) / count);
                    std::fill_n(&mean_product[first], width, static_cast<float>(total_product) / count);
                }
                differentiate_norm(x + at, slopes.data(), channels, mean.data(), inverse.data(), scale, mean_slope.data(),
                                   mean_product.data(), dx + at, length, columns);
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
