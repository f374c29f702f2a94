// GroupNorm's moments from one pass over channels-last rows: channel by channel, so that vectors run over all channels however few
// a group has, and merged by group in double.
#pragma once

#include "vectors.h"

namespace group_norm {

using vectors::widen;

constexpr int GROUPS = 8;
constexpr float EPSILON = 1e-5f;

// Adds the deviations from `center` of rows, `stride` apart, and the deviations' squares to each channel's sums. With one of the
// rows as center a large common offset does not eat the variance.
template <typename Element>
FOR_EACH_CPU void accumulate(const Element* values, int64_t stride, const float* center, float* __restrict__ sum,
                             float* __restrict__ square, int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        const Element* value = values + row * stride;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
            const float deviation = widen(value[c]) - center[c];
            sum[c] += deviation;
            square[c] += deviation * deviation;
        }
    }
}

struct Moments {
    double mean, inverse;  // inverse: 1 / sqrt(variance + EPSILON)
};

// Of a group of `width` channels from what `accumulate` found over all rows: means and deviations merged (Chan et al. 1979).
ALWAYS_INLINE Moments merge(const float* center, const float* sum, const float* square, int64_t rows, int64_t width) {
    const double share = 1.0 / rows;  // in float its rounding would enter the difference of squares below
    double total = 0, spread = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; ++c) total += center[c] + sum[c] * share;
    const double mean = total / width;
#pragma omp simd reduction(+ : spread)
    for (int64_t c = 0; c < width; ++c) {
        const double offset = center[c] + sum[c] * share - mean;
        spread += square[c] - sum[c] * share * sum[c] + rows * offset * offset;
    }
    return {mean, 1.0 / std::sqrt(std::max(spread, 0.0) / (rows * width) + EPSILON)};
}

}  // namespace group_norm
