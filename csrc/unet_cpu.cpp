#include "unet_cpu.h"

// Nobody reads floating-point exception flags or errno here; without this promise loops with a comparison stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math", "no-math-errno")
#endif

#include "threads.h"
#include "vectors.h"

namespace unet {
namespace {

using namespace vectors;
using threads::parallel;

// s^3 + q[2] s^2 + q[1] s + q[0], with three of the points' squares as roots (-1 is that of i).
struct Cubic {
    float q[3];
    constexpr Cubic(double a, double b, double c)
        : q{static_cast<float>(-a * b * c), static_cast<float>(a * b + a * c + b * c), static_cast<float>(-a - b - c)} {}
    ALWAYS_INLINE float operator()(float r0, float r1, float r2, float r3) const {
        return q[0] * r0 + q[1] * r1 + q[2] * r2 + r3;
    }
};

constexpr double A = 1.0 / 3, B = 7.0 / 8, C = 8.0 / 5;
constexpr Cubic WITHOUT_A(B * B, C * C, -1), WITHOUT_B(A * A, C * C, -1), WITHOUT_C(A * A, B * B, -1);
constexpr Cubic WITHOUT_I(A * A, B * B, C * C);

// B^T of one channel: the real points, 6 to 8 the remainder modulo x^2 + 1, 9 the leading coefficient. A point and its negative share
// the even and the odd part of their polynomials.
ALWAYS_INLINE void transform_input(const float* r, float* v) {
    const auto real = [&](const Cubic& others, float point, float* pair) {
        const float even = others(r[0], r[2], r[4], r[6]), odd = others(r[1], r[3], r[5], r[7]);
        pair[0] = odd + point * even;
        pair[1] = odd - point * even;
    };
    real(WITHOUT_A, A, v);
    real(WITHOUT_B, B, v + 2);
    real(WITHOUT_C, C, v + 4);
    const float even = WITHOUT_I(r[0], r[2], r[4], r[6]), odd = WITHOUT_I(r[1], r[3], r[5], r[7]);
    v[6] = even - odd;
    v[7] = even + odd;
    v[8] = odd;
    v[9] = even + WITHOUT_I(r[2], r[4], r[6], r[8]);
}

// A^T of one channel.
ALWAYS_INLINE void transform_output(const float* m, float* y) {
    const float even_a = m[0] + m[1], even_b = m[2] + m[3], even_c = m[4] + m[5], even_i = m[6] + m[8];
    const float odd_a = m[0] - m[1], odd_b = m[2] - m[3], odd_c = m[4] - m[5], odd_i = m[7] + m[8];
    constexpr float A1 = A, A2 = A * A, A3 = A * A2, A4 = A2 * A2;
    constexpr float B1 = B, B2 = B * B, B3 = B * B2, B4 = B2 * B2;
    constexpr float C1 = C, C2 = C * C, C3 = C * C2, C4 = C2 * C2;
    y[0] = even_a + even_b + even_c + even_i;
    y[1] = A1 * odd_a + B1 * odd_b + C1 * odd_c + odd_i;
    y[2] = A2 * even_a + B2 * even_b + C2 * even_c - even_i;
    y[3] = A3 * odd_a + B3 * odd_b + C3 * odd_c - odd_i;
    y[4] = A4 * even_a + B4 * even_b + C4 * even_c + even_i + m[9];
}

// All channels of a tile's rows -> its points. A row outside the sample is a row of zeros.
FOR_EACH_CPU
void input_tile(const bfloat16* const* rows, bfloat16* v, int64_t plane, int64_t channels) {
    const bfloat16* row[SPAN];
    std::copy(rows, rows + SPAN, row);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float r[SPAN], point[POINTS];
#pragma GCC unroll 9
        for (int i = 0; i < SPAN; ++i) r[i] = widen(row[i][c]);
        transform_input(r, point);
#pragma GCC unroll 10
        for (int i = 0; i < POINTS; ++i) v[i * plane + c] = narrow(point[i]);
    }
}

// All channels of a tile's points -> its rows `values` [TILE, C], bias added.
FOR_EACH_CPU
void output_tile(const bfloat16* const* points, const float* bias, float* __restrict__ values, int64_t channels) {
    const bfloat16* point[POINTS];
    std::copy(points, points + POINTS, point);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float m[POINTS], y[TILE];
#pragma GCC unroll 10
        for (int i = 0; i < POINTS; ++i) m[i] = widen(point[i][c]);
        transform_output(m, y);
#pragma GCC unroll 5
        for (int i = 0; i < TILE; ++i) values[i * channels + c] = y[i] + bias[c];
    }
}

// Adds the rows' deviations from `center` and their squares, channel by channel.
FOR_EACH_CPU
void accumulate(const float* __restrict__ values, const float* center, float* __restrict__ sum, float* __restrict__ square,
                int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* value = values + row * channels;
        for (int64_t c = 0; c < channels; ++c) {
            const float deviation = value[c] - center[c];
            sum[c] += deviation;
            square[c] += deviation * deviation;
        }
    }
}

// GroupNorm as y = scale x + shift, from what `accumulate` found over all rows: the channels' means and squared deviations
// merged (Chan et al. 1979).
FOR_EACH_CPU
void find_norm(const float* center, const float* sum, const float* square, const float* weight, const float* bias,
               float* __restrict__ scale, float* __restrict__ shift, int64_t rows, int64_t channels) {
    const int64_t width = channels / GROUPS;
    const double share = 1.0 / rows;  // in float its rounding would enter the difference of squares below
    for (int64_t from = 0; from < channels; from += width) {
        double total = 0, spread = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t c = from; c < from + width; ++c) total += center[c] + sum[c] * share;
        const double mean = total / width;
#pragma omp simd reduction(+ : spread)
        for (int64_t c = from; c < from + width; ++c) {
            const double offset = center[c] + sum[c] * share - mean;
            spread += square[c] - sum[c] * share * sum[c] + rows * offset * offset;
        }
        const double inverse = 1.0 / std::sqrt(std::max(spread, 0.0) / (rows * width) + EPSILON);
        for (int64_t c = from; c < from + width; ++c) {
            scale[c] = static_cast<float>(weight[c] * inverse);
            shift[c] = static_cast<float>(bias[c] - mean * weight[c] * inverse);
        }
    }
}

// One row: normalise, Mish, add time bias and residual.
FOR_EACH_CPU
void finish_row(const float* value, const float* scale, const float* shift, const float* time_bias, const bfloat16* residual,
                bfloat16* __restrict__ y, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        y[c] = narrow(mish(value[c] * scale[c] + shift[c]) + time_bias[c] + widen(residual[c]));
    }
}

}  // namespace

void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads) {
    const int64_t tiles = (length + TILE - 1) / TILE, width = channels + skip_channels, plane = batch * tiles * width;
    parallel(batch, num_threads, [=](int64_t first, int64_t last) {
        const std::vector<bfloat16> zeros(std::max(channels, skip_channels), 0);
        for (int64_t t = first * tiles; t < last * tiles; ++t) {
            const int64_t sample = t / tiles, top = TILE * (t % tiles) - 2;
            const auto transform = [&](const bfloat16* source, int64_t count, int64_t offset) {
                const bfloat16* rows[SPAN];
                for (int i = 0; i < SPAN; ++i) {
                    const int64_t row = top + i;
                    rows[i] = row < 0 || row >= length ? zeros.data() : source + (sample * length + row) * count;
                }
                input_tile(rows, v + t * width + offset, plane, count);
            };
            transform(x, channels, 0);
            if (skip) transform(skip, skip_channels, channels);
        }
    });
}

void winograd_output(const bfloat16* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int64_t batch, int64_t length, int64_t channels,
                     int num_threads) {
    const int64_t tiles = (length + TILE - 1) / TILE;
    parallel(batch, num_threads, [=](int64_t begin, int64_t end) {
        std::vector<float> values(TILE * tiles * channels), sum(channels), square(channels), scale(channels), shift(channels);
        const std::vector<float> no_bias(channels, 0.0f);
        const std::vector<bfloat16> no_residual(channels, 0);
        for (int64_t sample = begin; sample < end; ++sample) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            std::fill(square.begin(), square.end(), 0.0f);
            for (int64_t t = 0; t < tiles; ++t) {
                const bfloat16* points[POINTS];
                for (int i = 0; i < POINTS; ++i) points[i] = m[i] + (sample * tiles + t) * channels;
                float* tile = values.data() + TILE * t * channels;
                output_tile(points, bias, tile, channels);
                // Deviations from the first row, so that a large common offset does not eat the variance.
                accumulate(tile, values.data(), sum.data(), square.data(), std::min<int64_t>(TILE, length - TILE * t), channels);
            }
            find_norm(values.data(), sum.data(), square.data(), norm_weight, norm_bias, scale.data(), shift.data(), length,
                      channels);
            for (int64_t row = 0; row < length; ++row) {
                const int64_t at = (sample * length + row) * channels;
                finish_row(values.data() + row * channels, scale.data(), shift.data(), time_bias ? time_bias : no_bias.data(),
                           residual ? residual + at : no_residual.data(), y + at, channels);
            }
        }
    });
}

}  // namespace unet
