// The library's one small matrix product:  C (m x n)  =  or  +=   A (m x r) * B (r x n).
//
// B and C are panels whose rows are contiguous vectors; n is a multiple of VL. A is read one number at a time and
// broadcast, so it may have any strides: the same kernel multiplies by a matrix or by its transpose, and nothing
// is packed. C is added last, so that a long sum over many products is a sum of short ones. On a core with two 512-bit
// multiply-add units it runs at 85-90 % of their peak from L1 and L2.
#pragma once

#include "vector.h"

namespace vattn {
namespace VATTN_ISA {

// Vector registers, and rows of a register tile by vectors across it: sums, a row of B and numbers of A.
#if defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32, or 16
constexpr int tile_rows(int columns) { return columns == 4 ? 5 : columns == 3 ? 7 : columns == 2 ? 10 : 14; }
#else
constexpr bool MANY_REGISTERS = VATTN_VECTOR_BYTES == 64;
constexpr int tile_rows(int columns) {
  return MANY_REGISTERS ? (columns == 4 ? 6 : columns == 3 ? 8 : 12) : (columns == 2 ? 6 : 12);
}
#endif
constexpr int MAX_COLUMNS = MANY_REGISTERS ? 4 : 2;  // vectors across a register tile

struct Matrix {  // the A of a product: element (i, p) is data[i * row + p * column]
  const float* data;
  int64_t row, column;
};

template <int ROWS, int COLUMNS>
VATTN_INLINE void multiply_tile(bool accumulate, int64_t r, Matrix a, const float* b, int64_t ldb, float* c,
                                int64_t ldc) {
  Vec sum[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = Vec{};
  const float* ap = a.data;
  for (int64_t p = 0; p < r; ++p, ap += a.column, b += ldb) {
    Vec row[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) row[j] = load(b + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      float x = ap[i * a.row];
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      float* to = c + i * ldc + j * VL;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// The last rows, fewer than a register tile has.
template <int ROWS, int COLUMNS>
inline void multiply_rest(int64_t m, bool accumulate, int64_t r, Matrix a, const float* b, int64_t ldb, float* c,
                          int64_t ldc) {
  if constexpr (ROWS > 0) {
    if (m == ROWS)
      multiply_tile<ROWS, COLUMNS>(accumulate, r, a, b, ldb, c, ldc);
    else
      multiply_rest<ROWS - 1, COLUMNS>(m, accumulate, r, a, b, ldb, c, ldc);
  }
}

template <int COLUMNS>
__attribute__((noinline)) void multiply_columns(bool accumulate, int64_t m, int64_t r, Matrix a, const float* b,
                                                int64_t ldb, float* c, int64_t ldc) {
  constexpr int ROWS = tile_rows(COLUMNS);
  for (; m >= ROWS; m -= ROWS, a.data += ROWS * a.row, c += ROWS * ldc)
    multiply_tile<ROWS, COLUMNS>(accumulate, r, a, b, ldb, c, ldc);
  multiply_rest<ROWS - 1, COLUMNS>(m, accumulate, r, a, b, ldb, c, ldc);
}

constexpr int64_t SHORT_SUM = 64;  // terms that are added up in one register

inline void multiply(bool accumulate, int64_t m, int64_t n, int64_t r, Matrix a, const float* b, int64_t ldb, float* c,
                     int64_t ldc, int64_t terms = SHORT_SUM) {
  for (; r > terms; r -= terms, a.data += terms * a.column, b += terms * ldb, accumulate = true)
    multiply(accumulate, m, n, terms, a, b, ldb, c, ldc, terms);
  int64_t vectors = n / VL;
  int64_t parts = (vectors + MAX_COLUMNS - 1) / MAX_COLUMNS;
  for (; parts > 0; --parts) {  // five vectors are three and two, not four and one
    int64_t columns = (vectors + parts - 1) / parts;
    switch (columns) {
      case 1: multiply_columns<1>(accumulate, m, r, a, b, ldb, c, ldc); break;
      case 2: multiply_columns<2>(accumulate, m, r, a, b, ldb, c, ldc); break;
#if VATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
      case 3: multiply_columns<3>(accumulate, m, r, a, b, ldb, c, ldc); break;
      case 4: multiply_columns<4>(accumulate, m, r, a, b, ldb, c, ldc); break;
#endif
    }
    vectors -= columns;
    b += columns * VL;
    c += columns * VL;
  }
}

}  // namespace VATTN_ISA
}  // namespace vattn
