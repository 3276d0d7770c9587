// Matrix products of bfloat16 on AMX's tiles:  C (m x n)  =  or  +=   A (m x r) * B (r x n), summed up in float32.
//
// All comes in blocks of 16 rows of 64 bytes, which is what a tile holds. Two terms of a sum lie side by side in 32
// bits. Which two is ours to choose, as long as A and B agree: a term of 32 and the sixteenth one after it, so that two
// vectors of 16 floats become one row by shifts alone.
//
//     A  16 rows of 32 terms            B  16 pairs of terms, across 16 columns         C  16 x 16 floats
//        ( 0, 16) ( 1, 17) ( 2, 18) ..     row p:  (p, p + 16) of column 0, of column 1, ..
//
// Rows that come from memory have neighbours for pairs. Their channels are summed over as they lie, by `pack_columns`.
#pragma once

#include "vector.h"

namespace vattn {
namespace VATTN_ISA {

constexpr int64_t BLOCK = 16;                 // rows or columns
constexpr int64_t DEPTH = 32;                 // terms
constexpr int64_t BLOCK_SIZE = BLOCK * DEPTH;  // numbers

// Tiles of full size on this thread, while this object lives.
struct TilesInUse {
  TilesInUse() {
    struct Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    alignas(64) static constexpr Configuration configuration;
    _tile_loadconfig(&configuration);
  }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
};

// The A of a product: from row to row, and from block to block downwards and along the sum.
struct Left {
  const BFloat16* data;
  int64_t row, down, along;
};
// The B of a product: from block to block along the sum and across. The rows of a block lie side by side.
struct Right {
  const BFloat16* data;
  int64_t along, across;
};

// A and B are loaded with the hint that they need not stay in the first-level cache: it is C that has to, for where its
// rows miss that cache a product takes more than twice as long.
template <int M, int N>
VATTN_INLINE void multiply_blocks(bool accumulate, int64_t r, Left a, Right b, float* c, int64_t ldc) {
  const int64_t step = ldc * (int64_t)sizeof(float), row = a.row * (int64_t)sizeof(BFloat16);
  float* below = c + BLOCK * ldc;
  if (accumulate) {
    _tile_loadd(0, c, step);
    if constexpr (N == 2) _tile_loadd(1, c + BLOCK, step);
    if constexpr (M == 2) _tile_loadd(2, below, step);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, below + BLOCK, step);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t p = 0; p < r; ++p, a.data += a.along, b.data += b.along) {
    _tile_stream_loadd(4, a.data, row);
    _tile_stream_loadd(6, b.data, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_stream_loadd(7, b.data + b.across, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_stream_loadd(5, a.data + a.down, row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, step);
  if constexpr (N == 2) _tile_stored(1, c + BLOCK, step);
  if constexpr (M == 2) _tile_stored(2, below, step);
  if constexpr (M == 2 && N == 2) _tile_stored(3, below + BLOCK, step);
}

template <int M>
VATTN_INLINE void multiply_across(bool accumulate, int64_t n, int64_t r, Left a, Right b, float* c, int64_t ldc) {
  for (; n >= 2; n -= 2, b.data += 2 * b.across, c += 2 * BLOCK) multiply_blocks<M, 2>(accumulate, r, a, b, c, ldc);
  if (n > 0) multiply_blocks<M, 1>(accumulate, r, a, b, c, ldc);
}

// Sums of R blocks, 1 or 2, across n: A stays in tiles.
template <int M, int R>
VATTN_INLINE void multiply_short(int64_t n, Left a, Right b, float* c, int64_t ldc) {
  const int64_t step = ldc * (int64_t)sizeof(float), row = a.row * (int64_t)sizeof(BFloat16);
  _tile_stream_loadd(4, a.data, row);
  if constexpr (R == 2) _tile_stream_loadd(5, a.data + a.along, row);
  if constexpr (M == 2) _tile_stream_loadd(6, a.data + a.down, row);
  if constexpr (M == 2 && R == 2) _tile_stream_loadd(7, a.data + a.down + a.along, row);
  for (; n > 0; --n, b.data += b.across, c += BLOCK) {
    _tile_zero(0);
    _tile_stream_loadd(2, b.data, 64);
    _tile_dpbf16ps(0, 4, 2);
    if constexpr (M == 2) {
      _tile_zero(1);
      _tile_dpbf16ps(1, 6, 2);
    }
    if constexpr (R == 2) {
      _tile_stream_loadd(3, b.data + b.along, 64);
      _tile_dpbf16ps(0, 5, 3);
      if constexpr (M == 2) _tile_dpbf16ps(1, 7, 3);
    }
    _tile_stored(0, c, step);
    if constexpr (M == 2) _tile_stored(1, c + BLOCK * ldc, step);
  }
}

// Counts m, n and r of blocks.
__attribute__((noinline)) inline void multiply(bool accumulate, int64_t m, int64_t n, int64_t r, Left a, Right b,
                                               float* c, int64_t ldc) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  if (!accumulate && m <= 2 && r <= 2) {
    if (m == 2) return r == 2 ? multiply_short<2, 2>(n, a, b, c, ldc) : multiply_short<2, 1>(n, a, b, c, ldc);
    return r == 2 ? multiply_short<1, 2>(n, a, b, c, ldc) : multiply_short<1, 1>(n, a, b, c, ldc);
  }
  for (; m >= 2; m -= 2, a.data += 2 * a.down, c += 2 * BLOCK * ldc) multiply_across<2>(accumulate, n, r, a, b, c, ldc);
  if (m > 0) multiply_across<1>(accumulate, n, r, a, b, c, ldc);
}

VATTN_INLINE void store_pairs(BFloat16* p, VecUint x) { *(VecUintLoose*)p = x; }

// Rounded to bfloat16, in the upper half of a float. A NaN stays one if it is the processor's, or bfloat16.
VATTN_INLINE VecUint rounded(Vec x) { return (VecUint)x + 0x8000; }
// The upper halves of two, side by side.
VATTN_INLINE VecUint pairs(VecUint first, VecUint second) {
  constexpr int MERGE = 0xf8;  // a | (b & c)
  return (VecUint)_mm512_ternarylogic_epi32((__m512i)(first >> 16), (__m512i)second,
                                            _mm512_set1_epi32((int)0xffff0000), MERGE);
}

// Rows, multiples of 16, become columns of B: its terms are the channels, as they lie in pairs of neighbours. Blocks
// lie along the sum before they lie across.
inline void pack_columns(BFloat16* blocks, const BFloat16* rows, int64_t ld, int64_t count) {
  for (int64_t i = 0; i < count; i += BLOCK)
    for (int64_t d = 0; d < ld; d += DEPTH, blocks += BLOCK_SIZE)
      transpose_block((float*)blocks, BLOCK, (const float*)(rows + i * ld + d), ld / 2);
}

// Rows, multiples of 32, become rows of B: its terms are the rows. Blocks lie across before they lie along the sum.
inline void pack_terms(BFloat16* blocks, const BFloat16* rows, int64_t ld, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; i += DEPTH)
    for (int64_t d = 0; d < channels; d += BLOCK)
      for (int64_t p = 0; p < BLOCK; ++p, blocks += DEPTH) {
        const BFloat16* row = rows + (i + p) * ld + d;
        store_pairs(blocks, widened(row) | (VecUint)load(row + BLOCK * ld));
      }
}

// Rows, multiples of 32, become columns of A: its terms are the rows. Blocks lie downwards before they lie along the
// sum.
inline void pack_turned(BFloat16* blocks, const BFloat16* rows, int64_t ld, int64_t count) {
  alignas(64) float low[BLOCK * BLOCK], high[BLOCK * BLOCK];  // pairs of channels, of 16 rows each
  for (int64_t i = 0; i < count; i += DEPTH)
    for (int64_t d = 0; d < ld; d += DEPTH) {
      const float* from = (const float*)(rows + i * ld + d);
      transpose_block(low, BLOCK, from, ld / 2);
      transpose_block(high, BLOCK, from + BLOCK * ld / 2, ld / 2);
      for (int64_t p = 0; p < BLOCK; ++p, blocks += 2 * DEPTH) {
        const VecUint first = (VecUint)load(low + p * BLOCK), second = (VecUint)load(high + p * BLOCK);
        store_pairs(blocks, pairs(first << 16, second << 16));
        store_pairs(blocks + DEPTH, pairs(first, second));
      }
    }
}

// rows (count x channels)  =  or  +=   the transpose of `turned` (channels x count), of which it may read 15 numbers
// more.
inline void add_turned(bool accumulate, float* rows, int64_t ld, const float* turned, int64_t ld_turned, int64_t count,
                       int64_t channels) {
  alignas(64) float block[BLOCK * BLOCK];
  for (int64_t i = 0; i < count; i += BLOCK)
    for (int64_t d = 0; d < channels; d += BLOCK) {
      transpose_block(block, BLOCK, turned + d * ld_turned + i, ld_turned);
      for (int64_t j = 0; j < least(BLOCK, count - i); ++j) {
        float* row = rows + (i + j) * ld + d;
        const Vec x = load(block + j * BLOCK);
        store(row, accumulate ? load(row) + x : x);
      }
    }
}

}  // namespace VATTN_ISA
}  // namespace vattn
