// The learned bias of relative positions, looked up for a tile of scores, its gradient and its tangent.
//
// A bias depends on the difference of two codes, one for each token, so a row of scores needs a stretch of the table
// where neighbours across the row have neighbouring codes:
//
//     tokens across   7  8  9 | 40 41 42 43         two runs of neighbours, for the token 5 down the side:
//     table           2  3  4 | 35 36 37 38         two loads, and no gather
//
// Global tokens have no position. They come first in a tile, and their biases lie behind those of differences.
#pragma once

#include "vector.h"

namespace vattn {
namespace VATTN_ISA {

// A tile of scores has the keys across and queries down its side. The table is turned around, so that its index grows
// with the code of the key: middle + key - query.
class BiasTile {
  struct Piece {
    Mask mask;     // the lanes of a vector that are one run
    int32_t code;  // of its first lane, were the run so long
  };
  const Positions* positions;
  const int32_t* codes;
  const uint32_t* across;
  int64_t count, globals, vectors, first_piece[TILE / VL + 1];
  Piece piece[TILE];

  // The entry of a pair of which at least one is global.
  int64_t entry(int64_t query, int64_t key) const {
    const Positions& p = *positions;
    if (query >= p.G) return p.differences + p.G + key;
    return p.differences + (key >= p.G ? query : 2 * p.G + query * p.G + key);
  }

 public:
  // Takes `count` tokens of sample b, which must outlive their use, across.
  void set(const Positions& p, int64_t b, const uint32_t* tokens, int64_t new_count) {
    positions = &p, codes = p.codes + b * p.codes_batch;
    across = tokens, count = new_count, vectors = (count + VL - 1) / VL, globals = 0;
    while (globals < count && across[globals] < p.G) ++globals;
    int64_t pieces = 0;
    int32_t next = 0;
    for (int64_t j = 0; j < vectors * VL; ++j) {
      if (j % VL == 0) first_piece[j / VL] = pieces;
      if (j < globals || j >= count) continue;
      int32_t code = codes[across[j] - p.G], lane = (int32_t)(j % VL);
      if (lane == 0 || j == globals || code != next) piece[pieces++] = {Mask{}, code - lane};
      include(piece[pieces - 1].mask, lane);
      next = code + 1;
    }
    first_piece[vectors] = pieces;
  }

  // Adds the biases in `table`, that of a head, to a tile of scores, whose rows are those of `side`.
  void add(const float* table, float* tile, const uint32_t* side, int64_t rows) const {
    const Positions& p = *positions;
    int64_t i = 0;
    for (; i < rows && side[i] < p.G; ++i) {
      float bias = table[entry(side[i], p.G)];  // the same for all tokens that are not global
      for (int64_t j = globals; j < count; ++j) tile[i * TILE + j] += bias;
    }
    for (; i + 4 <= rows; i += 4) add_rows<4>(table, tile + i * TILE, side + i);
    for (; i < rows; ++i) add_rows<1>(table, tile + i * TILE, side + i);
    for (int64_t j = 0; j < globals; ++j)
      for (i = 0; i < rows; ++i) tile[i * TILE + j] += table[entry(side[i], across[j])];
  }

  // Adds to `grads`, as the table lies, the gradients of a tile of scores, whose rows are those of `side`.
  void accumulate(float* grads, const float* tile, const uint32_t* side, int64_t rows) const {
    const Positions& p = *positions;
    int64_t begin = 0;
    for (; begin < rows && side[begin] < p.G; ++begin) {
      float sum = 0;
      for (int64_t j = globals; j < count; ++j) sum += tile[begin * TILE + j];
      grads[entry(side[begin], p.G)] += sum;
    }
    for (int64_t end; begin < rows; begin = end) {
      end = run_end(side, begin, rows);
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t i = first_piece[v]; i < first_piece[v + 1]; ++i)
          add_diagonals(grads, tile + v * VL, piece[i], side, begin, end);
    }
    for (int64_t j = 0; j < globals; ++j)
      for (int64_t i = 0; i < rows; ++i) grads[entry(side[i], across[j])] += tile[i * TILE + j];
  }

 private:
  template <int ROWS>
  VATTN_INLINE void add_rows(const float* table, float* tile, const uint32_t* side) const {
    const Positions& p = *positions;
    const float* from[ROWS];
    for (int r = 0; r < ROWS; ++r) from[r] = table + p.middle - codes[side[r] - p.G];
    for (int64_t v = 0; v < vectors; ++v) {
      Vec bias[ROWS] = {};
      for (int64_t i = first_piece[v]; i < first_piece[v + 1]; ++i)
        for (int r = 0; r < ROWS; ++r) bias[r] = load(piece[i].mask, from[r] + piece[i].code, bias[r]);
      for (int r = 0; r < ROWS; ++r) {
        float* to = tile + r * TILE + v * VL;
        store(to, load(to) + bias[r]);
      }
    }
  }

  // Where neighbours down the side, VL of them at most, cease to have neighbouring codes.
  int64_t run_end(const uint32_t* side, int64_t begin, int64_t rows) const {
    const int64_t G = positions->G;
    int64_t end = begin + 1;
    while (end < rows && end - begin < VL && codes[side[end] - G] == codes[side[end - 1] - G] + 1) ++end;
    return end;
  }

  // Rows of a run belong a place further down in the table each. They are moved to where the last one belongs and added
  // up there, rather than in memory: a processor waits where it reads what overlaps two things just written.
  //
  //     row 5       a b c            low and high | . . a b | c . . . |
  //     row 6       d e f                         | . d e f | . . . . |
  //     row 7       g h i                         | g h i . | . . . . |
  VATTN_INLINE void add_diagonals(float* grads, const float* tile, Piece run, const uint32_t* side, int64_t begin,
                                  int64_t end) const {
    Vec low{}, high{};
    for (int64_t i = begin; i < end; ++i) {
      Vec x = keep(run.mask, load(tile + i * TILE));
      const int32_t by = (int32_t)(end - 1 - i);
      low += moved_up(x, by), high += moved_up(x, by - VL);
    }
    float* to = grads + positions->middle - codes[side[end - 1] - positions->G] + run.code;
    store(to, load(to) + low);
    store(to + VL, load(to + VL) + high);
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
