#include "convolution_cpu.h"

#include <memory>

#include "threads.h"
#include "vectors.h"
#include "winograd.h"

namespace convolution {
namespace {

using threads::parallel;

constexpr auto& winograd = winograd::transform<float>;
constexpr int TAPS = winograd.TAPS, SPAN = winograd.SPAN, TILE = winograd.TILE, POINTS = winograd.POINTS;

// `multiply` keeps GROUP x LANES sums in 12 of AVX2's 16 registers.
constexpr int LANES = 16, GROUP = 6;
constexpr int64_t PADDING = 16;  // keeps planes from following each other by a multiple of 4 KB, where they would share a few sets
constexpr int64_t PACKED = 32;   // channels that are laid out at a time

typedef float Eight __attribute__((vector_size(32)));
typedef float EightAnywhere __attribute__((vector_size(32), aligned(4), may_alias));

int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Memory that nobody clears.
std::unique_ptr<float[]> allocate(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// A: all channels of the gradients of a tile's rows -> those of its products, POINTS planes.
FOR_EACH_CPU
void gradient_tile(const float* const* rows, float* points, int64_t plane, int64_t channels) {
    const float* row[TILE];
    std::copy(rows, rows + TILE, row);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        float r[TILE], point[POINTS];
#pragma GCC unroll 32
        for (int i = 0; i < TILE; ++i) r[i] = row[i][c];
        winograd.output_gradient(r, point);
#pragma GCC unroll 32
        for (int i = 0; i < POINTS; ++i) points[i * plane + c] = point[i];
    }
}

// G: a row of filters, its taps `tap` apart -> points.
ALWAYS_INLINE void transform_filters(const float* filters, int64_t tap, float* points, int64_t plane, int64_t count) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) {
        float w[TAPS], point[POINTS];
#pragma GCC unroll 8
        for (int i = 0; i < TAPS; ++i) w[i] = filters[i * tap + c];
        winograd.filter(w, point);
#pragma GCC unroll 32
        for (int i = 0; i < POINTS; ++i) points[i * plane + c] = point[i];
    }
}

// sums[g][lane] (+)= sum_k u[g u_group + k u_step] v[k v_step + lane], for GROUP g and LANES lanes.
ALWAYS_INLINE void multiply(const float* u, int64_t u_group, int64_t u_step, const float* v, int64_t v_step, int64_t depth,
                            float* sums, bool add) {
    Eight sum[GROUP][2];
#pragma GCC unroll 8
    for (int g = 0; g < GROUP; ++g) sum[g][0] = sum[g][1] = Eight{};
    for (int64_t k = 0; k < depth; ++k, u += u_step, v += v_step) {
        const Eight first = *reinterpret_cast<const EightAnywhere*>(v), second = *reinterpret_cast<const EightAnywhere*>(v + 8);
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; ++g) {
            const float factor = u[g * u_group];
            sum[g][0] += factor * first;
            sum[g][1] += factor * second;
        }
    }
    // Sums of `depth` terms are added up, not one of all: it would lose more digits.
    EightAnywhere* to = reinterpret_cast<EightAnywhere*>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * GROUP; ++i) to[i] = add ? to[i] + sum[i / 2][i % 2] : sum[i / 2][i % 2];
}

// Filters whose points are in the cache together. Forward a row of them is one output's inputs, backward one input's outputs.
template <bool BACKWARD>
struct Block {
    static constexpr int64_t OUTPUTS = BACKWARD ? 48 : 24, DEPTH = BACKWARD ? 32 : 64, PLANE = OUTPUTS * DEPTH + PADDING;
    static constexpr int64_t OUTPUT_STEP = BACKWARD ? 1 : DEPTH, INPUT_STEP = BACKWARD ? OUTPUTS : 1;
};

// The products of `count` outputs from `first` on: v [panel][point][inputs][LANES] -> m [point][panel][OUTPUTS][LANES].
template <bool BACKWARD>
FOR_EACH_CPU void multiply_block(const float* v, const float* filters, int64_t inputs, int64_t outputs, int64_t panels,
                                 int64_t first, int64_t count, float* u, float* m) {
    using B = Block<BACKWARD>;
    const int64_t width = BACKWARD ? outputs : inputs, v_plane = inputs * LANES + PADDING;
    for (int64_t at = 0; at < inputs; at += B::DEPTH) {
        const int64_t depth = std::min(B::DEPTH, inputs - at), next_depth = std::min(B::DEPTH, inputs - at - depth);
        const float* block = filters + (BACKWARD ? at * TAPS * width + first : first * TAPS * width + at);
        for (int64_t row = 0; row < (BACKWARD ? depth : count); ++row) {
            const float* tap_0 = block + (row * TAPS + (BACKWARD ? TAPS - 1 : 0)) * width;
            transform_filters(tap_0, BACKWARD ? -width : width, u + row * std::max(B::OUTPUT_STEP, B::INPUT_STEP), B::PLANE,
                              BACKWARD ? count : depth);
        }
        // The next block's filters are asked for now, some at each point: memory answers while the processor multiplies.
        const float* next = block + (BACKWARD ? depth * TAPS * width : depth);
        const int64_t rows = TAPS * (BACKWARD ? next_depth : next_depth ? count : 0), columns = BACKWARD ? count : next_depth;
        for (int p = 0; p < POINTS; ++p) {
            for (int64_t row = rows * p / POINTS; row < rows * (p + 1) / POINTS; ++row) {
                for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(next + row * width + c, 0, 2);
            }
            for (int64_t panel = 0; panel < panels; ++panel) {
                for (int64_t o = 0; o < count; o += GROUP) {
                    multiply(u + p * B::PLANE + o * B::OUTPUT_STEP, B::OUTPUT_STEP, B::INPUT_STEP,
                             v + (panel * POINTS + p) * v_plane + at * LANES, LANES, depth,
                             m + ((p * panels + panel) * B::OUTPUTS + o) * LANES, at > 0);
                }
            }
        }
    }
}

// A^T: a panel's products m, `plane` apart, [outputs][LANES] -> rows [LANES][TILE][OUTPUTS].
template <bool BACKWARD>
FOR_EACH_CPU void transform_products(const float* m, int64_t plane, float* rows, int64_t count) {
    constexpr int64_t OUTPUTS = Block<BACKWARD>::OUTPUTS;
    for (int64_t o = 0; o < count; ++o) {
#pragma GCC ivdep
        for (int lane = 0; lane < LANES; ++lane) {
            float point[POINTS], y[TILE];
#pragma GCC unroll 32
            for (int i = 0; i < POINTS; ++i) point[i] = m[i * plane + o * LANES + lane];
            winograd.output(point, y);
#pragma GCC unroll 32
            for (int i = 0; i < TILE; ++i) rows[(lane * TILE + i) * OUTPUTS + o] = y[i];
        }
    }
}

template <bool BACKWARD>
void convolve_tiles(const float* x, const float* filters, const float* bias, float* y, const winograd::Tiles<float>& tiles,
                    int64_t inputs, int64_t outputs, int num_threads) {
    using B = Block<BACKWARD>;
    const int64_t panels = divide_up(tiles.count, LANES), v_plane = inputs * LANES + PADDING;
    const auto points = allocate(panels * POINTS * v_plane);
    float* const v = points.get();
    parallel(divide_up(inputs, PACKED), num_threads, [&](int64_t begin, int64_t end) {
        const std::vector<float> zeros(PACKED, 0.0f);
        for (int64_t from = begin * PACKED; from < std::min(inputs, end * PACKED); from += PACKED) {
            for (int64_t tile = 0; tile < panels * LANES; ++tile) {
                const float* rows[SPAN];
                tiles.find_rows<SPAN>(x + from, inputs, tile, TAPS / 2, zeros.data(), rows);
                float* to = v + tile / LANES * POINTS * v_plane + from * LANES + tile % LANES;
                winograd::input_tile<float, LANES>(rows, to, v_plane, std::min(PACKED, inputs - from));
            }
        }
    });
    parallel(divide_up(outputs, B::OUTPUTS), num_threads, [&](int64_t begin, int64_t end) {
        std::vector<float> u(POINTS * B::PLANE), m(POINTS * panels * B::OUTPUTS * LANES), rows(LANES * TILE * B::OUTPUTS);
        for (int64_t first = begin * B::OUTPUTS; first < std::min(outputs, end * B::OUTPUTS); first += B::OUTPUTS) {
            const int64_t count = std::min(B::OUTPUTS, outputs - first);
            multiply_block<BACKWARD>(v, filters, inputs, outputs, panels, first, count, u.data(), m.data());
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t plane = panels * B::OUTPUTS * LANES;
                transform_products<BACKWARD>(m.data() + panel * B::OUTPUTS * LANES, plane, rows.data(), count);
                for (int64_t lane = 0; lane < std::min<int64_t>(LANES, tiles.count - panel * LANES); ++lane) {
                    const int64_t tile = panel * LANES + lane, top = TILE * (tile % tiles.of_sample);
                    float* to = y + (tile / tiles.of_sample * tiles.length + top) * outputs + first;
                    const float* row = rows.data() + lane * TILE * B::OUTPUTS;
                    for (int64_t i = 0; i < std::min<int64_t>(TILE, tiles.length - top); ++i) {
                        for (int64_t o = 0; o < count; ++o) {
                            to[i * outputs + o] = row[i * B::OUTPUTS + o] + (bias ? bias[first + o] : 0.0f);
                        }
                    }
                }
            }
        }
    });
}

// Lays the points of one tile [POINTS][plane] out as [block of WIDTH channels][point][tile][WIDTH].
template <int WIDTH>
void spread(const float* points, int64_t plane, float* to, int64_t tile, int64_t tiles, int64_t channels) {
    for (int64_t c = 0; c < channels; c += WIDTH) {
        for (int p = 0; p < POINTS; ++p) {
            std::copy_n(points + p * plane + c, WIDTH, to + ((c / WIDTH * POINTS + p) * tiles + tile) * WIDTH);
        }
    }
}

// The gradient of the filters of GROUP outputs and LANES inputs from the points of all tiles; that of `outputs` and `inputs` of
// them is written, rows of `width` apart.
FOR_EACH_CPU
void differentiate_filters(const float* m, const float* v, int64_t tiles, float* gradient, int64_t width, int64_t outputs,
                           int64_t inputs) {
    float u[POINTS * GROUP * LANES];
    for (int64_t row = 0; row < outputs * TAPS; ++row) __builtin_prefetch(gradient + row * width, 1, 3);
    for (int p = 0; p < POINTS; ++p) {
        multiply(m + p * tiles * GROUP, 1, GROUP, v + p * tiles * LANES, LANES, tiles, u + p * GROUP * LANES, false);
    }
    for (int64_t o = 0; o < outputs; ++o) {
        float rows[TAPS][LANES];
#pragma GCC ivdep
        for (int lane = 0; lane < LANES; ++lane) {
            float point[POINTS], w[TAPS];
#pragma GCC unroll 32
            for (int i = 0; i < POINTS; ++i) point[i] = u[(i * GROUP + o) * LANES + lane];
            winograd.filter_gradient(point, w);
#pragma GCC unroll 8
            for (int i = 0; i < TAPS; ++i) rows[i][lane] = w[i];
        }
        for (int i = 0; i < TAPS; ++i) std::copy_n(rows[i], inputs, gradient + (o * TAPS + i) * width);
    }
}

}  // namespace

void convolve(const float* x, const float* filters, const float* bias, float* y, int64_t batch, int64_t length, int64_t inputs,
              int64_t outputs, bool backward, int num_threads) {
    const winograd::Tiles<float> tiles{batch, length};
    (backward ? convolve_tiles<true> : convolve_tiles<false>)(x, filters, bias, y, tiles, inputs, outputs, num_threads);
}

void filter_gradient(const float* x, const float* dy, float* gradient, int64_t batch, int64_t length, int64_t inputs,
                     int64_t outputs, int num_threads) {
    constexpr int64_t TOGETHER = 8;  // groups whose points, 6.5 KB each for 16 tiles, stay in the cache while all inputs' go by
    const winograd::Tiles<float> tiles{batch, length};
    const int64_t input_blocks = divide_up(inputs, LANES), groups = divide_up(outputs, GROUP);
    const auto input_points = allocate(input_blocks * POINTS * tiles.count * LANES);
    const auto gradient_points = allocate(groups * POINTS * tiles.count * GROUP);
    float *const v = input_points.get(), *const m = gradient_points.get();
    parallel(tiles.count, num_threads, [&](int64_t begin, int64_t end) {
        const int64_t widest = std::max(input_blocks * LANES, groups * GROUP), plane = widest + PADDING;
        std::vector<float> points(POINTS * plane);
        const std::vector<float> zeros(widest, 0.0f);
        const float* rows[SPAN];
        for (int64_t tile = begin; tile < end; ++tile) {
            tiles.find_rows<SPAN>(x, inputs, tile, TAPS / 2, zeros.data(), rows);
            winograd::input_tile<float, 1>(rows, points.data(), plane, inputs);
            spread<LANES>(points.data(), plane, v, tile, tiles.count, inputs);
            tiles.find_rows<TILE>(dy, outputs, tile, 0, zeros.data(), rows);
            gradient_tile(rows, points.data(), plane, outputs);
            spread<GROUP>(points.data(), plane, m, tile, tiles.count, outputs);
        }
    });
    parallel(divide_up(groups, TOGETHER), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * TOGETHER; first < std::min(groups, end * TOGETHER); first += TOGETHER) {
            for (int64_t block = 0; block < input_blocks; ++block) {
                for (int64_t group = first; group < std::min(groups, first + TOGETHER); ++group) {
                    const int64_t size = POINTS * tiles.count, o = group * GROUP, c = block * LANES;
                    differentiate_filters(m + group * size * GROUP, v + block * size * LANES, tiles.count,
                                          gradient + o * TAPS * inputs + c, inputs, std::min<int64_t>(GROUP, outputs - o),
                                          std::min<int64_t>(LANES, inputs - c));
                }
            }
        }
    });
}

}  // namespace convolution
