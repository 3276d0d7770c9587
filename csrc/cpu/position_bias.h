// The learned bias of relative positions, looked up for a tile of scores, and its gradient.
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

// A tile of scores has the queries across (forward) or the keys (backward). Of the latter the table is reversed, so that
// in both the index grows with the code across: middle + across - side.
template <bool QUERIES_ACROSS>
class BiasTile {
  struct Piece {
    VecInt mask;  // the lanes of a vector that are one run
    int64_t code;  // of its first lane, were the run so long
  };
  const Positions& p;
  const float* table;
  const int32_t* codes;
  const uint32_t* across = nullptr;
  int64_t count = 0, globals, vectors, first_piece[TILE / VL + 1];
  Piece piece[TILE];

  // The entry of a pair of which at least one is global.
  int64_t entry(int64_t query, int64_t key) const {
    if (query >= p.G) return p.differences + p.G + key;
    return p.differences + (key >= p.G ? query : 2 * p.G + query * p.G + key);
  }
  int64_t global_entry(int64_t across, int64_t side) const {
    return QUERIES_ACROSS ? entry(across, side) : entry(side, across);
  }

 public:
  BiasTile(const Positions& p, int64_t b, int64_t h)
      : p(p), table((QUERIES_ACROSS ? p.table : p.reversed) + h * p.table_head), codes(p.codes + b * p.codes_batch) {}

  // Makes the tokens across `count` others, which must outlive their use.
  void set(const uint32_t* tokens, int64_t new_count) {
    across = tokens, count = new_count, vectors = (count + VL - 1) / VL, globals = 0;
    while (globals < count && across[globals] < p.G) ++globals;
    int64_t pieces = 0, next = 0;
    for (int64_t j = 0; j < vectors * VL; ++j) {
      if (j % VL == 0) first_piece[j / VL] = pieces;
      if (j < globals || j >= count) continue;
      int64_t code = codes[across[j] - p.G], lane = j % VL;
      if (lane == 0 || j == globals || code != next) piece[pieces++] = {VecInt{}, code - lane};
      piece[pieces - 1].mask[lane] = -1;
      next = code + 1;
    }
    first_piece[vectors] = pieces;
  }

  // Adds to a row of scores the biases of the token `side`.
  void add(float* row, int64_t side) const {
    if (side < p.G) {
      float bias = table[global_entry(p.G, side)];  // the same for all tokens that are not global
      for (int64_t j = globals; j < count; ++j) row[j] += bias;
    } else {
      const float* from = table + p.middle - codes[side - p.G];
      for (int64_t v = 0; v < vectors; ++v) {
        Vec bias{};
        for (int64_t i = first_piece[v]; i < first_piece[v + 1]; ++i)
          bias = select(piece[i].mask, load(from + piece[i].code), bias);
        store(row + v * VL, load(row + v * VL) + bias);
      }
    }
    for (int64_t j = 0; j < globals; ++j) row[j] += table[global_entry(across[j], side)];
  }

  // Adds to `grads`, as the table lies, the gradients of a row of scores.
  void accumulate(float* grads, const float* row, int64_t side) const {
    if (side < p.G) {
      float sum = 0;
      for (int64_t j = globals; j < count; ++j) sum += row[j];
      grads[global_entry(p.G, side)] += sum;
    } else {
      float* to = grads + p.middle - codes[side - p.G];
      for (int64_t v = 0; v < vectors; ++v) {
        Vec grad = load(row + v * VL);
        for (int64_t i = first_piece[v]; i < first_piece[v + 1]; ++i) {
          float* run = to + piece[i].code;
          store(run, load(run) + select(piece[i].mask, grad, Vec{}));
        }
      }
    }
    for (int64_t j = 0; j < globals; ++j) grads[global_entry(across[j], side)] += row[j];
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
