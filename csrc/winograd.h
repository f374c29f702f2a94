// Winograd's transforms of a convolution of five taps, one channel at a time; kernels/winograd.py says what the points are and why.
// Those of filters and of gradients are for training, whose filters change at every step; constant ones come transformed.
#pragma once

#include "vectors.h"

namespace winograd {

// y = A^T [(G w) * (B^T x)] for the points p and -p of PAIRS numbers, infinity, and with WITH_I the pair +-i; so the filter's
// gradient is dw = G^T [(A dy) * (B^T x)].
//
// Row p of B^T holds the coefficients of M(x) / (x - p), M being the polynomial whose roots all points are. It is (x + p) Q(x^2), and
// Q, which has the other points' squares as roots, serves -p too: a point and its negative share its even and its odd part.
template <int PAIRS, bool WITH_I>
struct Transform {
    static constexpr int TAPS = 5, SPAN = 2 * (PAIRS + WITH_I) + 1, TILE = SPAN - TAPS + 1;  // input and output rows of a tile
    static constexpr int POINTS = 2 * PAIRS + 3 * WITH_I + 1;               // products of a tile
    static constexpr int LAST = PAIRS + WITH_I;                             // M's degree in x^2

    float point[PAIRS] = {}, power[PAIRS][TILE] = {}, weight[PAIRS][TAPS] = {};
    float others[PAIRS][LAST] = {}, others_of_i[LAST] = {}, all[LAST + 1] = {};

    constexpr explicit Transform(const double (&points)[PAIRS]) {
        for (int k = 0; k < PAIRS; ++k) {
            point[k] = static_cast<float>(points[k]);
            double value = 1;
            for (int i = 0; i < TILE; ++i, value *= points[k]) power[k][i] = static_cast<float>(value);
            double slope = 2 * points[k] * (WITH_I ? points[k] * points[k] + 1 : 1);  // M' at the point
            for (int j = 0; j < PAIRS; ++j) slope *= j == k ? 1 : points[k] * points[k] - points[j] * points[j];
            value = 1 / slope;
            for (int tap = 0; tap < TAPS; ++tap, value *= points[k]) weight[k][tap] = static_cast<float>(value);
            multiply_roots(points, k, others[k]);
        }
        if (WITH_I) multiply_roots(points, PAIRS, others_of_i);
        multiply_roots(points, -1, all);
    }

    // B^T: input rows r -> points v, in the order p, -p for each of the numbers, remainder modulo x^2 + 1, infinity.
    ALWAYS_INLINE void input(const float* r, float* v) const {
#pragma GCC unroll 16
        for (int k = 0; k < PAIRS; ++k) {
            const float even = dot<LAST>(others[k], r), odd = dot<LAST>(others[k], r + 1);
            v[2 * k] = odd + point[k] * even;
            v[2 * k + 1] = odd - point[k] * even;
        }
        if constexpr (WITH_I) {
            const float even = dot<LAST>(others_of_i, r), odd = dot<LAST>(others_of_i, r + 1);
            v[2 * PAIRS] = even - odd;
            v[2 * PAIRS + 1] = even + odd;
            v[2 * PAIRS + 2] = odd;
        }
        v[POINTS - 1] = dot<LAST + 1>(all, r);
    }

    // A^T: products m -> output rows y.
    ALWAYS_INLINE void output(const float* m, float* y) const {
#pragma GCC unroll 16
        for (int k = 0; k < PAIRS; ++k) {
            const float even = m[2 * k] + m[2 * k + 1], odd = m[2 * k] - m[2 * k + 1];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) {
                const float term = power[k][i] * (i % 2 ? odd : even);
                y[i] = k ? y[i] + term : term;
            }
        }
        if constexpr (WITH_I) {
            const float even = m[2 * PAIRS] + m[2 * PAIRS + 2], odd = m[2 * PAIRS + 1] + m[2 * PAIRS + 2];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) y[i] += (i / 2 % 2 ? -1.0f : 1.0f) * (i % 2 ? odd : even);
        }
        y[TILE - 1] += m[POINTS - 1];
    }

    // A: the output rows' gradients y -> the products' m.
    ALWAYS_INLINE void output_gradient(const float* y, float* m) const {
        static_assert(!WITH_I);
#pragma GCC unroll 16
        for (int k = 0; k < PAIRS; ++k) {
            float even = power[k][0] * y[0], odd = power[k][1] * y[1];
#pragma GCC unroll 16
            for (int i = 2; i < TILE; ++i) (i % 2 ? odd : even) += power[k][i] * y[i];
            m[2 * k] = even + odd;
            m[2 * k + 1] = even - odd;
        }
        m[POINTS - 1] = y[TILE - 1];
    }

    // G: taps w -> points u.
    ALWAYS_INLINE void filter(const float* w, float* u) const {
        static_assert(!WITH_I);
#pragma GCC unroll 16
        for (int k = 0; k < PAIRS; ++k) {
            const float even = weight[k][0] * w[0] + weight[k][2] * w[2] + weight[k][4] * w[4];
            const float odd = weight[k][1] * w[1] + weight[k][3] * w[3];
            u[2 * k] = odd + even;
            u[2 * k + 1] = odd - even;
        }
        u[POINTS - 1] = w[TAPS - 1];
    }

    // G^T: the points' gradients u -> the taps' w.
    ALWAYS_INLINE void filter_gradient(const float* u, float* w) const {
        static_assert(!WITH_I);
#pragma GCC unroll 16
        for (int k = 0; k < PAIRS; ++k) {
            const float even = u[2 * k] - u[2 * k + 1], odd = u[2 * k] + u[2 * k + 1];
#pragma GCC unroll 5
            for (int tap = 0; tap < TAPS; ++tap) {
                const float term = weight[k][tap] * (tap % 2 ? odd : even);
                w[tap] = k ? w[tap] + term : term;
            }
        }
        w[TAPS - 1] += u[POINTS - 1];
    }

  private:
    // The coefficients in x^2 of the polynomial whose roots are all points' squares but that of number `left_out`; PAIRS is i.
    template <int SIZE>
    static constexpr void multiply_roots(const double (&points)[PAIRS], int left_out, float (&coefficients)[SIZE]) {
        double product[LAST + 1] = {1};
        int degree = 0;
        for (int k = 0; k < LAST; ++k) {
            if (k == left_out) continue;
            const double root = k < PAIRS ? points[k] * points[k] : -1;
            for (int i = ++degree; i >= 0; --i) product[i] = (i ? product[i - 1] : 0) - root * product[i];
        }
        for (int i = 0; i < SIZE; ++i) coefficients[i] = static_cast<float>(product[i]);
    }

    // Every second row times a coefficient.
    template <int SIZE>
    static ALWAYS_INLINE float dot(const float (&coefficients)[SIZE], const float* r) {
        float sum = coefficients[0] * r[0];
#pragma GCC unroll 16
        for (int i = 1; i < SIZE; ++i) sum += coefficients[i] * r[2 * i];
        return sum;
    }
};

template <typename Element>
inline constexpr int transform = 0;
template <>
inline constexpr Transform<3, true> transform<vectors::bfloat16>({1.0 / 3, 7.0 / 8, 8.0 / 5});
template <>
inline constexpr Transform<8, false> transform<float>({0.13, 0.39, 0.63, 0.85, 1.05, 1.34, 1.94, 3.8});

// A batch of samples [B, L, channels], row-major, in tiles; those of a sample side by side.
template <typename Element>
struct Tiles {
    static constexpr int TILE = transform<Element>.TILE;
    int64_t batch, length, of_sample = (length + TILE - 1) / TILE, count = batch * of_sample;

    // ROWS rows of x from `before` rows above a tile's own; `zeros` outside of the sample, and for tiles beyond the last.
    template <int ROWS>
    void find_rows(const Element* x, int64_t channels, int64_t tile, int before, const Element* zeros, const Element** rows) const {
        const int64_t sample = tile / of_sample, top = TILE * (tile % of_sample) - before;
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = tile < count && top + i >= 0 && top + i < length;
            rows[i] = inside ? x + (sample * length + top + i) * channels : zeros;
        }
    }
};

// B^T: all channels of a tile's rows -> its points, planes of them; neighbouring channels STRIDE apart.
template <typename Element, int STRIDE>
FOR_EACH_CPU void input_tile(const Element* const* rows, Element* points, int64_t plane, int64_t channels) {
    constexpr auto& winograd = transform<Element>;
    const Element* row[winograd.SPAN];
    std::copy(rows, rows + winograd.SPAN, row);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float r[winograd.SPAN], point[winograd.POINTS];
#pragma GCC unroll 32
        for (int i = 0; i < winograd.SPAN; ++i) r[i] = vectors::widen(row[i][c]);
        winograd.input(r, point);
#pragma GCC unroll 32
        for (int i = 0; i < winograd.POINTS; ++i) points[i * plane + c * STRIDE] = vectors::narrow<Element>(point[i]);
    }
}

}  // namespace winograd
