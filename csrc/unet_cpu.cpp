#include "unet_cpu.h"

#include "group_norm.h"
#include "threads.h"
#include "vectors.h"
#include "winograd.h"

namespace unet {
namespace {

using namespace vectors;
using group_norm::GROUPS;
using threads::parallel;
using winograd::transform;

// All channels of a tile's points -> its rows `values` [TILE, C], bias added.
template <typename Element>
FOR_EACH_CPU void output_tile(const Element* const* points, const float* bias, float* __restrict__ values, int64_t channels) {
    constexpr auto& winograd = transform<Element>;
    const Element* point[winograd.POINTS];
    std::copy(points, points + winograd.POINTS, point);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float m[winograd.POINTS], y[winograd.TILE];
#pragma GCC unroll 32
        for (int i = 0; i < winograd.POINTS; ++i) m[i] = widen(point[i][c]);
        winograd.output(m, y);
#pragma GCC unroll 32
        for (int i = 0; i < winograd.TILE; ++i) values[i * channels + c] = y[i] + bias[c];
    }
}

// GroupNorm as y = scale x + shift, from what `accumulate` found over all rows.
FOR_EACH_CPU
void find_norm(const float* center, const float* sum, const float* square, const float* weight, const float* bias,
               float* __restrict__ scale, float* __restrict__ shift, int64_t rows, int64_t channels) {
    const int64_t width = channels / GROUPS;
    for (int64_t from = 0; from < channels; from += width) {
        const auto [mean, inverse] = group_norm::merge(center + from, sum + from, square + from, rows, width);
        for (int64_t c = from; c < from + width; ++c) {
            scale[c] = static_cast<float>(weight[c] * inverse);
            shift[c] = static_cast<float>(bias[c] - mean * weight[c] * inverse);
        }
    }
}

// One row: normalise, Mish, add time bias and residual.
template <typename Element>
FOR_EACH_CPU void finish_row(const float* value, const float* scale, const float* shift, const float* time_bias,
                             const Element* residual, Element* __restrict__ y, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        y[c] = narrow<Element>(mish(value[c] * scale[c] + shift[c]) + time_bias[c] + widen(residual[c]));
    }
}

}  // namespace

template <typename Element>
void winograd_input(const Element* x, const Element* skip, Element* v, int64_t batch, int64_t length, int64_t channels,
                    int64_t skip_channels, int num_threads) {
    const winograd::Tiles<Element> tiles{batch, length};
    const int64_t width = channels + skip_channels, plane = tiles.count * width;
    parallel(batch, num_threads, [=](int64_t first, int64_t last) {
        const std::vector<Element> zeros(std::max(channels, skip_channels), 0);
        for (int64_t t = first * tiles.of_sample; t < last * tiles.of_sample; ++t) {
            const auto fill = [&](const Element* source, int64_t count, int64_t offset) {
                constexpr auto& winograd = transform<Element>;
                const Element* rows[winograd.SPAN];
                tiles.template find_rows<winograd.SPAN>(source, count, t, winograd.TAPS / 2, zeros.data(), rows);
                winograd::input_tile<Element, 1>(rows, v + t * width + offset, plane, count);
            };
            fill(x, channels, 0);
            if (skip) fill(skip, skip_channels, channels);
        }
    });
}

template <typename Element>
void winograd_output(const Element* const* m, const float* bias, const float* norm_weight, const float* norm_bias,
                     const float* time_bias, const Element* residual, Element* y, int64_t batch, int64_t length, int64_t channels,
                     int num_threads) {
    constexpr int TILE = transform<Element>.TILE;
    const int64_t tiles = (length + TILE - 1) / TILE;
    parallel(batch, num_threads, [=](int64_t begin, int64_t end) {
        std::vector<float> values(TILE * tiles * channels), sum(channels), square(channels), scale(channels), shift(channels);
        const std::vector<float> no_bias(channels, 0.0f);
        const std::vector<Element> no_residual(channels, 0);
        for (int64_t sample = begin; sample < end; ++sample) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            std::fill(square.begin(), square.end(), 0.0f);
            for (int64_t t = 0; t < tiles; ++t) {
                const Element* points[transform<Element>.POINTS];
                for (int i = 0; i < transform<Element>.POINTS; ++i) points[i] = m[i] + (sample * tiles + t) * channels;
                float* tile = values.data() + TILE * t * channels;
                output_tile(points, bias, tile, channels);
                const int64_t rows = std::min<int64_t>(TILE, length - TILE * t);
                group_norm::accumulate(tile, channels, values.data(), sum.data(), square.data(), rows, channels);
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

template void winograd_input(const bfloat16*, const bfloat16*, bfloat16*, int64_t, int64_t, int64_t, int64_t, int);
template void winograd_input(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t, int);
template void winograd_output(const bfloat16* const*, const float*, const float*, const float*, const float*, const bfloat16*,
                              bfloat16*, int64_t, int64_t, int64_t, int);
template void winograd_output(const float* const*, const float*, const float*, const float*, const float*, const float*, float*,
                              int64_t, int64_t, int64_t, int);

}  // namespace unet
