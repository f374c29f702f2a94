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

constexpr int MOST_POINTS = 8;
using threads::parallel;

// The transforms of one channel. A pair of points +-p shares the even and the odd part of its polynomial.
template <int TILE>
struct Transform;

template <>
struct Transform<2> {
    static constexpr int POINTS = 6;
    static constexpr float A = 3.0f / 2, B = 2.0f / 3;  // A B = 1
    static ALWAYS_INLINE void input(const float* r, float* v) {
        v[0] = r[0] - (A * A + B * B) * r[2] + r[4];
        const float even_a = r[4] - B * B * r[2], odd_a = A * r[3] - B * r[1];
        v[1] = even_a + odd_a;
        v[2] = even_a - odd_a;
        const float even_b = r[4] - A * A * r[2], odd_b = B * r[3] - A * r[1];
        v[3] = even_b + odd_b;
        v[4] = even_b - odd_b;
        v[5] = r[1] - (A * A + B * B) * r[3] + r[5];
    }
    static ALWAYS_INLINE void output(const float* m, float* y) {
        y[0] = m[0] + m[1] + m[2] + m[3] + m[4];
        y[1] = A * (m[1] - m[2]) + B * (m[3] - m[4]) + m[5];
    }
};

template <>
struct Transform<4> {
    static constexpr int POINTS = 8;
    static ALWAYS_INLINE void input(const float* r, float* v) {
        v[0] = r[6] - r[0] + 5.25f * (r[2] - r[4]);
        const float even_1 = r[6] - 4.25f * r[4] + r[2], odd_1 = r[5] - 4.25f * r[3] + r[1];
        v[1] = even_1 + odd_1;
        v[2] = even_1 - odd_1;
        const float even_2 = r[6] - 1.25f * r[4] + 0.25f * r[2], odd_2 = 2.0f * r[5] - 2.5f * r[3] + 0.5f * r[1];
        v[3] = even_2 + odd_2;
        v[4] = even_2 - odd_2;
        const float even_3 = r[6] - 5.0f * r[4] + 4.0f * r[2], odd_3 = 0.5f * r[5] - 2.5f * r[3] + 2.0f * r[1];
        v[5] = even_3 + odd_3;
        v[6] = even_3 - odd_3;
        v[7] = r[7] - r[1] + 5.25f * (r[3] - r[5]);
    }
    static ALWAYS_INLINE void output(const float* m, float* y) {
        const float even_1 = m[1] + m[2], odd_1 = m[1] - m[2], even_2 = m[3] + m[4], odd_2 = m[3] - m[4];
        const float even_3 = m[5] + m[6], odd_3 = m[5] - m[6];
        y[0] = m[0] + even_1 + even_2 + even_3;
        y[1] = odd_1 + 2.0f * odd_2 + 0.5f * odd_3;
        y[2] = even_1 + 4.0f * even_2 + 0.25f * even_3;
        y[3] = odd_1 + 8.0f * odd_2 + 0.125f * odd_3 + m[7];
    }
};

// B^T for the rows of one tile. A row outside the sample is a row of zeros.
template <int TILE>
ALWAYS_INLINE void transform_input(const bfloat16* const* rows, bfloat16* const* out, int64_t channels) {
    constexpr int POINTS = Transform<TILE>::POINTS;
    const bfloat16* row[POINTS];
    bfloat16* point[POINTS];
    std::copy(rows, rows + POINTS, row);
    std::copy(out, out + POINTS, point);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float r[POINTS], v[POINTS];
#pragma GCC unroll 8
        for (int i = 0; i < POINTS; ++i) r[i] = widen(row[i][c]);
        Transform<TILE>::input(r, v);
#pragma GCC unroll 8
        for (int i = 0; i < POINTS; ++i) point[i][c] = narrow(v[i]);
    }
}

// A^T for one tile: all channels of its points -> TILE rows of `values` [TILE, C], bias added.
template <int TILE>
ALWAYS_INLINE void transform_output(const bfloat16* const* points, const float* bias, float* values, int64_t channels) {
    constexpr int POINTS = Transform<TILE>::POINTS;
    const bfloat16* point[POINTS];
    std::copy(points, points + POINTS, point);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float m[POINTS], y[TILE];
#pragma GCC unroll 8
        for (int i = 0; i < POINTS; ++i) m[i] = widen(point[i][c]);
        Transform<TILE>::output(m, y);
#pragma GCC unroll 4
        for (int i = 0; i < TILE; ++i) values[i * channels + c] = y[i] + bias[c];
    }
}

// Templates cannot be cloned, so each tile size has its function.
FOR_EACH_CPU void input_2(const bfloat16* const* rows, bfloat16* const* out, int64_t channels) {
    transform_input<2>(rows, out, channels);
}
FOR_EACH_CPU void input_4(const bfloat16* const* rows, bfloat16* const* out, int64_t channels) {
    transform_input<4>(rows, out, channels);
}
FOR_EACH_CPU void output_2(const bfloat16* const* points, const float* bias, float* values, int64_t channels) {
    transform_output<2>(points, bias, values, channels);
}
FOR_EACH_CPU void output_4(const bfloat16* const* points, const float* bias, float* values, int64_t channels) {
    transform_output<4>(points, bias, values, channels);
}

// Sums of the rows' deviations from `center` and of their squares, channel by channel.
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

// One row: normalise, Mish, add time bias and residual.
FOR_EACH_CPU
void finish_row(const float* value, const float* scale, const float* shift, const float* time_bias, const bfloat16* residual,
                bfloat16* __restrict__ y, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        y[c] = narrow(mish(value[c] * scale[c] + shift[c]) + time_bias[c] + widen(residual[c]));
    }
}

}  // namespace

void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int tile, int64_t batch, int64_t length,
                    int64_t channels, int64_t skip_channels, int num_threads) {
    const int points = tile + 4;
    const int64_t tiles = (length + tile - 1) / tile, width = channels + skip_channels, plane = batch * tiles * width;
    parallel(batch, num_threads, [=](int64_t first, int64_t last) {
        const std::vector<bfloat16> zeros(std::max(channels, skip_channels), 0);
        for (int64_t t = first * tiles; t < last * tiles; ++t) {
            const int64_t sample = t / tiles, top = tile * (t % tiles) - 2;
            const auto transform = [&](const bfloat16* source, int64_t count, int64_t offset) {
                const bfloat16* rows[MOST_POINTS];
                bfloat16* out[MOST_POINTS];
                for (int i = 0; i < points; ++i) {
                    const int64_t row = top + i;
                    rows[i] = row < 0 || row >= length ? zeros.data() : source + (sample * length + row) * count;
                    out[i] = v + i * plane + t * width + offset;
                }
                (tile == 2 ? input_2 : input_4)(rows, out, count);
            };
            transform(x, channels, 0);
            if (skip) transform(skip, skip_channels, channels);
        }
    });
}

void winograd_output(const bfloat16* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int tile, int64_t batch, int64_t length,
                     int64_t channels, int num_threads) {
    const int64_t tiles = (length + tile - 1) / tile, width = channels / GROUPS;
    parallel(batch, num_threads, [=](int64_t begin, int64_t end) {
        std::vector<float> values(tile * tiles * channels), sum(channels), square(channels), scale(channels), shift(channels);
        const std::vector<float> no_bias(channels, 0.0f);
        const std::vector<bfloat16> no_residual(channels, 0);
        for (int64_t sample = begin; sample < end; ++sample) {
            for (int64_t t = 0; t < tiles; ++t) {
                const bfloat16* points[MOST_POINTS];
                for (int i = 0; i < tile + 4; ++i) points[i] = m[i] + (sample * tiles + t) * channels;
                (tile == 2 ? output_2 : output_4)(points, bias, values.data() + tile * t * channels, channels);
            }
            // Deviations from the first row, so that a large common offset does not eat the variance.
            std::fill(sum.begin(), sum.end(), 0.0f);
            std::fill(square.begin(), square.end(), 0.0f);
            accumulate(values.data(), values.data(), sum.data(), square.data(), length, channels);
            for (int64_t from = 0; from < channels; from += width) {
                // Merge the channels' means and squared deviations (Chan et al. 1979).
                double total = 0, spread = 0;
                for (int64_t c = from; c < from + width; ++c) total += values[c] + sum[c] / length;
                const double mean = total / width;
                for (int64_t c = from; c < from + width; ++c) {
                    const double offset = values[c] + sum[c] / length - mean;
                    spread += square[c] - static_cast<double>(sum[c]) * sum[c] / length + length * offset * offset;
                }
                const double inverse = 1.0 / std::sqrt(std::max(spread, 0.0) / (length * width) + EPSILON);
                for (int64_t c = from; c < from + width; ++c) {
                    scale[c] = static_cast<float>(norm_weight[c] * inverse);
                    shift[c] = static_cast<float>(norm_bias[c] - mean * norm_weight[c] * inverse);
                }
            }
            for (int64_t row = 0; row < length; ++row) {
                const int64_t at = (sample * length + row) * channels;
                finish_row(values.data() + row * channels, scale.data(), shift.data(), time_bias ? time_bias : no_bias.data(),
                           residual ? residual + at : no_residual.data(), y + at, channels);
            }
        }
    });
}

}  // namespace unet
