// Products with constant float32 matrices on the CPU, y[p] = x[p] w[p] + bias for a stack of matrices.
//
// A matrix is laid out once, as the products read it: panels of `lanes` columns, of each its rows one behind the other. With few
// rows of x the time is that of reading the matrices from memory, so they are read in one go, and asked for before they are needed.
#pragma once

#include <cstdint>

namespace matrix {

// Columns of a panel: two of this processor's registers.
int lanes();

// x [count, rows, depth], w [count, columns / lanes rounded up, depth, lanes], bias [columns] or null -> y [count, rows, columns].
void multiply(const float* x, const float* w, const float* bias, float* y, int64_t count, int64_t rows, int64_t depth,
              int64_t columns, int num_threads);

}  // namespace matrix
