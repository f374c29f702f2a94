#include "unet_cpu.h"

// Nobody reads floating-point exception flags or errno here; without this promise loops with a comparison stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math", "no-math-errno")
#endif

#include "vectors.h"

namespace unet {
namespace {

using namespace vectors;

// B^T for six rows of one channel block. Row outside the sample: a row of zeros.
FOR_EACH_CPU
void transform_input(const bfloat16* const rows[POINTS], bfloat16* const out[POINTS], int64_t channels) {
    const bfloat16 *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5];
    bfloat16 *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        const float a = widen(r0[c]), b = widen(r1[c]), d = widen(r2[c]);
        const float e = widen(r3[c]), f = widen(r4[c]), g = widen(r5[c]);
        o0[c] = narrow(a + 1.5f * (b - e) - 2.0f * d + f);
        o1[c] = narrow(b + 2.5f * d + 0.5f * e - f);
        o2[c] = narrow(b + 0.5f * d - 2.5f * e + f);
        o3[c] = narrow(2.0f * (f - d) + e - b);
        o4[c] = narrow(2.0f * (e - b) + d - f);
        o5[c] = narrow(b + 1.5f * (d - f) - 2.0f * e + g);
    }
}

// A^T for one pair of rows: all channels of six points -> two rows of `scratch`, bias added.
FOR_EACH_CPU
void transform_output(const bfloat16* const points[POINTS], const float* bias, float* __restrict__ first,
                      float* __restrict__ second, int64_t channels) {
    const bfloat16 *p0 = points[0], *p1 = points[1], *p2 = points[2], *p3 = points[3], *p4 = points[4], *p5 = points[5];
    for (int64_t c = 0; c < channels; ++c) {
        const float m1 = widen(p1[c]), m2 = widen(p2[c]), m3 = widen(p3[c]), m4 = widen(p4[c]);
        first[c] = widen(p0[c]) + m1 + m2 + m3 + m4 + bias[c];
        second[c] = m1 - m2 + 2.0f * m3 - 0.5f * m4 + widen(p5[c]) + bias[c];
    }
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

void winograd_input(const bfloat16* x, const bfloat16* skip, bfloat16* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads) {
    const int64_t tiles = (length + 1) / 2, width = channels + skip_channels, plane = batch * tiles * width;
    parallel(batch, num_threads, [=](int64_t first, int64_t last) {
        const std::vector<bfloat16> zeros(std::max(channels, skip_channels), 0);
        for (int64_t tile = first * tiles; tile < last * tiles; ++tile) {
            const int64_t sample = tile / tiles, top = 2 * (tile % tiles) - 2;
            const auto transform = [&](const bfloat16* source, int64_t count, int64_t offset) {
                const bfloat16* rows[POINTS];
                bfloat16* out[POINTS];
                for (int i = 0; i < POINTS; ++i) {
                    const int64_t row = top + i;
                    rows[i] = row < 0 || row >= length ? zeros.data() : source + (sample * length + row) * count;
                    out[i] = v + i * plane + tile * width + offset;
                }
                transform_input(rows, out, count);
            };
            transform(x, channels, 0);
            if (skip) transform(skip, skip_channels, channels);
        }
    });
}

void winograd_output(const bfloat16* const m[POINTS], const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const bfloat16* residual, bfloat16* y, int64_t batch, int64_t length,
                     int64_t channels, int num_threads) {
    const int64_t tiles = (length + 1) / 2, width = channels / GROUPS;
    parallel(batch, num_threads, [=](int64_t begin, int64_t end) {
        std::vector<float> values(2 * tiles * channels), sum(channels), square(channels), scale(channels), shift(channels);
        const std::vector<float> no_bias(channels, 0.0f);
        const std::vector<bfloat16> no_residual(channels, 0);
        for (int64_t sample = begin; sample < end; ++sample) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const bfloat16* points[POINTS];
                for (int i = 0; i < POINTS; ++i) points[i] = m[i] + (sample * tiles + tile) * channels;
                float* row = values.data() + 2 * tile * channels;
                transform_output(points, bias, row, row + channels, channels);
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
