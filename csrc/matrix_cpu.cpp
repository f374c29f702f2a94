#include "matrix_cpu.h"

#include "threads.h"
#include "vectors.h"

namespace matrix {
namespace {

using threads::parallel;

constexpr int64_t CHUNK = 96;   // rows of x that share a reading of a matrix
constexpr int64_t DEPTH = 128;  // terms of a sum at a time: its part of a panel stays in the cache, short sums lose fewer digits
constexpr int64_t GROUP = 6;    // rows whose sums, of a panel's two registers each, are all held in registers: 12 of 16 or 32
constexpr int64_t FEW = 4;      // groups of rows, up to which reading a matrix takes longer than multiplying it

// WIDTH numbers are a register; a panel is two of them wide.
template <int WIDTH>
struct Vector {
    typedef float type __attribute__((vector_size(4 * WIDTH)));
    typedef float anywhere __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
    static constexpr int LANES = 2 * WIDTH;
};

// A part of x's rows, a chunk of one matrix's, laid out in groups of up to GROUP rows: [depth][rows of the group] each.
struct Chunk {
    int64_t first, rows, groups;

    Chunk(int64_t index, int64_t chunks, int64_t all_rows)
        : first(all_rows * index / chunks), rows(all_rows * (index + 1) / chunks - first), groups((rows + GROUP - 1) / GROUP) {}

    int64_t begin(int64_t group) const { return rows * group / groups; }

    void lay_out(const float* x, float* to, int64_t depth) const {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t from = begin(group), count = begin(group + 1) - from;
            for (int64_t row = 0; row < count; ++row) {
                const float* const source = x + (first + from + row) * depth;
                float* const target = to + from * depth + row;
                for (int64_t k = 0; k < depth; ++k) target[k * count] = source[k];
            }
        }
    }
};

// Has memory send a row of a panel.
template <int LANES>
ALWAYS_INLINE void ask_for(const float* row) {
    for (int lane = 0; lane < LANES; lane += 16) __builtin_prefetch(row + lane, 0, 3);
}

// sums [ROWS, LANES] (+)= x [depth, ROWS]^T panel [depth, LANES].
template <int WIDTH, int ROWS, bool ASK>
ALWAYS_INLINE void multiply_group(const float* x, const float* panel, int64_t depth, float* sums, bool add) {
    using Register = typename Vector<WIDTH>::type;
    using Anywhere = typename Vector<WIDTH>::anywhere;
    constexpr int LANES = Vector<WIDTH>::LANES;
    Register sum[2 * ROWS] = {};
    for (int64_t k = 0; k < depth; ++k, x += ROWS, panel += LANES) {
        if (ASK) ask_for<LANES>(panel + DEPTH * LANES);
        const Register part[2] = {*reinterpret_cast<const Anywhere*>(panel), *reinterpret_cast<const Anywhere*>(panel + WIDTH)};
#pragma GCC unroll 32
        for (int i = 0; i < 2 * ROWS; ++i) sum[i] += x[i / 2] * part[i % 2];
    }
    Anywhere* to = reinterpret_cast<Anywhere*>(sums);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * ROWS; ++i) to[i] = add ? to[i] + sum[i] : sum[i];
}

template <int WIDTH, int ROWS, bool ASK>
ALWAYS_INLINE void multiply_up_to(int64_t rows, const float* x, const float* panel, int64_t depth, float* sums, bool add) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return multiply_up_to<WIDTH, ROWS - 1, ASK>(rows, x, panel, depth, sums, add);
    }
    multiply_group<WIDTH, ROWS, ASK>(x, panel, depth, sums, add);
}

// One panel: x as a chunk lays it out -> sums [rows of the chunk, LANES].
template <int WIDTH>
ALWAYS_INLINE void multiply_panel(const float* x, const float* panel, int64_t depth, const Chunk& chunk, float* sums) {
    constexpr int LANES = Vector<WIDTH>::LANES;
    const bool few = chunk.groups < FEW;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t terms = std::min(DEPTH, depth - k);
        for (int64_t group = 0; group < chunk.groups; ++group) {
            const int64_t from = chunk.begin(group), rows = chunk.begin(group + 1) - from;
            const float *own = x + from * depth + k * rows, *part = panel + k * LANES;
            // Of the next block one row at each of these products, or where there are many, some before each group of them.
            if (few && group == 0) {
                multiply_up_to<WIDTH, GROUP, true>(rows, own, part, terms, sums + from * LANES, k > 0);
                continue;
            }
            if (!few) {
                const int64_t end = DEPTH + DEPTH * (group + 1) / chunk.groups;
                for (int64_t row = DEPTH + DEPTH * group / chunk.groups; row < end; ++row) ask_for<LANES>(part + row * LANES);
            }
            multiply_up_to<WIDTH, GROUP, false>(rows, own, part, terms, sums + from * LANES, k > 0);
        }
    }
}

using MultiplyPanel = void (*)(const float* x, const float* panel, int64_t depth, const Chunk& chunk, float* sums);

constexpr int NARROW = 8;  // AVX2
FOR_EACH_CPU void multiply_narrow(const float* x, const float* panel, int64_t depth, const Chunk& chunk, float* sums) {
    multiply_panel<NARROW>(x, panel, depth, chunk, sums);
}

constexpr int WIDE = 16;  // AVX-512
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) void multiply_wide(const float* x, const float* panel, int64_t depth, const Chunk& chunk,
                                                      float* sums) {
    multiply_panel<WIDE>(x, panel, depth, chunk, sums);
}

bool find_wide() { return __builtin_cpu_supports("avx512f"); }
#else
constexpr MultiplyPanel multiply_wide = multiply_narrow;
bool find_wide() { return false; }
#endif

bool is_wide() {
    static const bool wide = find_wide();
    return wide;
}

}  // namespace

int lanes() { return is_wide() ? Vector<WIDE>::LANES : Vector<NARROW>::LANES; }

void multiply(const float* x, const float* w, const float* bias, float* y, int64_t count, int64_t rows, int64_t depth,
              int64_t columns, int num_threads) {
    const MultiplyPanel compute = is_wide() ? multiply_wide : multiply_narrow;
    const int64_t width = lanes(), panels = (columns + width - 1) / width, chunks = (rows + CHUNK - 1) / CHUNK;
    parallel(count * chunks * panels, num_threads, [=](int64_t begin, int64_t end) {
        // Kept from call to call: memory that is asked for anew comes as untouched pages.
        static thread_local std::vector<float> laid_out, sums(CHUNK * width);
        laid_out.resize(std::max<size_t>(laid_out.size(), CHUNK * depth));
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t panel = unit % panels, part = unit / panels % chunks, matrix = unit / panels / chunks;
            const Chunk chunk(part, chunks, rows);
            if (unit == begin || panel == 0) chunk.lay_out(x + matrix * rows * depth, laid_out.data(), depth);
            compute(laid_out.data(), w + (matrix * panels + panel) * depth * width, depth, chunk, sums.data());
            const int64_t first = panel * width, own = std::min(width, columns - first);
            for (int64_t row = 0; row < chunk.rows; ++row) {
                float* const to = y + (matrix * rows + chunk.first + row) * columns + first;
                for (int64_t i = 0; i < own; ++i) to[i] = sums[row * width + i] + (bias ? bias[first + i] : 0.0f);
            }
        }
    });
}

}  // namespace matrix
