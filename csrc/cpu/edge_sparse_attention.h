// Edge-sparse attention's itinerary: a block of queries, and the global tokens and blocks of keys that it reads.
//
//     keys of block 2    | G |  block 1  |  block 2  |  block 7  |        tiles of keys straddle the blocks
//     rows of the head     0   G + 56      G + 112     G + 392
//
// Rows are tokens, or, with an order, places of tokens, of which blocks are consecutive ones in either case. Unit 0 of a
// head is its global queries, which read all keys, row after row; unit 1 + i is block i. Where no token reads a later
// one, the parts of a unit are its queries.
#pragma once

#include "positions.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct EdgeQuery;

template <class T>
struct EdgeBlock : PositionedItinerary<T, EdgeSparseAttention, EdgeBlock<T>> {
  static constexpr bool SHARES_KEYS = true, SHARES_TILES = true;
  using Base = PositionedItinerary<T, EdgeSparseAttention, EdgeBlock<T>>;
  using Base::a, Base::b, Base::h, typename Base::Tile;
  const int32_t* list = nullptr;    // the blocks that are read; null if all keys are
  const int64_t* before = nullptr;  // with an order, of each of them the keys of those before it
  int64_t blocks = 0;               // how many
  int64_t full = 0;                 // without an order, of them, those before the first that is short
  int64_t keys, slice;

  EdgeBlock(const EdgeSparseAttention& a, int64_t b, int64_t h, int64_t unit, int64_t slice)
      : Base(a, b, h, a.G), keys(a.Lq), slice(slice) {
    if (unit == 0) return;
    const int32_t* offsets = a.row_offsets + b * a.layout_batch + h * a.layout_head + unit - 1;
    blocks = offsets[1] - offsets[0];
    list = a.columns + offsets[0];
    this->query_begin = a.begin(unit - 1);
    this->queries = a.length(unit - 1);
    keys = a.G, full = blocks;
    if (a.tokens) {
      before = a.keys_before + offsets[0];
      if (blocks > 0) keys += before[blocks - 1] + a.length(list[blocks - 1]);
      return;
    }
    for (int64_t i = 0; i < blocks; ++i) {
      int64_t length = a.length(list[i]);
      keys += length;
      if (length < a.block_size) full = least(full, i);
    }
  }
  // Items count (b, h, unit): what a block reads, others of its head have read.
  EdgeBlock(const EdgeSparseAttention& a, int64_t index)
      : EdgeBlock(a, index / a.units() / a.H, index / a.units() % a.H, index % a.units(), 0) {}

  // Calls f(first row, count, keys before) for the pieces of `count` keys from `first` on.
  template <class F>
  VATTN_INLINE void each_piece(int64_t first, int64_t count, F f) const {
    if (!list) return f(first, count, 0);
    int64_t done = 0;
    if (first < a.G) f(first, done = least(count, a.G - first), 0);
    if (done == count) return;
    int64_t at = first + done - a.G, i = entry_of(at);
    for (; done < count; ++i, at = 0) {
      int64_t piece = least(count - done, a.length(list[i]) - at);
      if (piece > 0) f(a.begin(list[i]) + at, piece, done);
      done += piece;
    }
  }
  // Which of the blocks has key `at` of those that are read, which then counts from the block's first.
  VATTN_INLINE int64_t entry_of(int64_t& at) const {
    int64_t i = 0;
    if (before) {
      for (int64_t end = blocks, middle; (middle = (i + end) / 2) > i;) (before[middle] <= at ? i : end) = middle;
      at -= before[i];
      return i;
    }
    i = least(at / a.block_size, full);
    for (at -= i * a.block_size; at >= a.length(list[i]); ++i) at -= a.length(list[i]);
    return i;
  }
  // Rows from a key to the one that will be read as many keys later as a block has, if no block is short.
  int64_t to_next_block(int64_t key) const {
    if (!list || key < a.G) return AHEAD;
    int64_t at = key - a.G;
    const int64_t i = before ? entry_of(at) : at / a.block_size;
    return i + 1 < blocks ? a.begin(list[i + 1]) - a.begin(list[i]) : 0;
  }
  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    each_piece(first, count, [&](int64_t row, int64_t n, int64_t done) {
      this->load_rows(x, row, n, rows + done * ld, ld, times, to_next_block(first + done));
    });
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    each_piece(first, count, [&](int64_t row, int64_t n, int64_t done) {
      for (int64_t i = 0; i < n; ++i) tokens[done + i] = (uint32_t)this->token(row + i);
    });
  }
  // Of all keys, row after row; what a slice of the units gives lies behind that of the slices before.
  void store_keys(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    this->store_part(x, a.slices, slice, a.slice_grad, first, count, rows, ld, times);
  }

  // Scores of the first global query are kept on the way.
  void adjust_scores(const Tile& tile, int64_t first, int64_t count, float* scores) const {
    Base::adjust_scores(tile, first, count, scores);
    if (!list && first == 0 && a.importance)
      for (int64_t k = tile.first < a.G ? a.G - tile.first : 0; k < tile.count; ++k)
        a.importance[(b * a.H + h) * (a.Lq - a.G) + this->token(tile.first + k) - a.G] = scores[k];
  }
  void adjust_grads(const Tile& tile, int64_t first, int64_t count, const float* grads) const {
    if (a.positions.table) this->accumulate_bias(tile, grads_of_bias(), first, count, grads);
  }
  void forget_bias() const {
    if (a.positions.table) zero(grads_of_bias(), a.positions.differences + (2 + a.G) * a.G);
  }

  bool shares_tiles() const { return a.positions.causal && list; }
  template <class F>
  static void each_part(const EdgeSparseAttention& a, int64_t index, int64_t slice, int64_t first, int64_t count, F f) {
    for (int64_t query = first; query < first + count; ++query) f(EdgeQuery<T>(a, index, slice, query), query, 1);
  }

 private:
  float* grads_of_bias() const { return a.grad_bias + ((slice * a.B + b) * a.H + h) * a.positions.table_head; }
};

// One query of a block, or of the global ones, where no token reads a later one.
template <class T>
struct EdgeQuery : EdgeBlock<T> {
  static constexpr bool SHARES_TILES = false;
  using Base = EdgeBlock<T>;
  using Base::a, typename Base::Tile;
  int64_t query;

  EdgeQuery(const EdgeSparseAttention& a, int64_t index, int64_t slice, int64_t query)
      : Base(a, index / a.units() / a.H, index / a.units() % a.H, index % a.units(), slice), query(query) {}

  bool reads(int64_t token) const { return this->may_read(this->token(this->query_begin + query), token); }
  template <class F>
  void each_piece(int64_t first, int64_t count, F f) const {
    Base::each_piece(first, count, [&](int64_t row, int64_t n, int64_t done) {
      for (int64_t i = 0; i < n; ++i)
        if (reads(this->token(row + i))) f(row + i, 1, done + i);
    });
  }
  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    zero(rows, count * ld);
    each_piece(first, count, [&](int64_t row, int64_t n, int64_t done) {
      this->load_rows(x, row, n, rows + done * ld, ld, times);
    });
  }
  void adjust_grads(const Tile& tile, int64_t first, int64_t count, float* grads) const {
    forget_unread(tile, grads);
    Base::adjust_grads(tile, first, count, grads);
  }
  void adjust_tangents(const Tile& tile, int64_t first, int64_t count, float* tangents) const {
    Base::adjust_tangents(tile, first, count, tangents);
    forget_unread(tile, tangents);
  }
  void forget_unread(const Tile& tile, float* row) const {
    for (int64_t j = 0; j < tile.count; ++j)
      if (!reads(tile.keys[j])) row[j] = 0;
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
