// Edge-sparse attention's itinerary: a block of queries, and the global tokens and blocks of keys that it reads.
//
//     keys of block 2    | G |  block 1  |  block 2  |  block 7  |        tiles of keys straddle the blocks
//     rows of the head     0   G + 56      G + 112     G + 392
//
// Unit 0 of a head is its global queries, which read all keys as they lie; unit 1 + i is block i.
#pragma once

#include "positions.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct EdgeBlock : PositionedItinerary<T, EdgeSparseAttention, EdgeBlock<T>> {
  using Base = PositionedItinerary<T, EdgeSparseAttention, EdgeBlock<T>>;
  using Base::a, Base::b, Base::h;
  const int32_t *list = nullptr, *list_end = nullptr;  // the blocks that are read; null if all keys are
  int64_t keys, slice = 0;
  mutable struct {  // a block of the list, and the keys before it
    const int32_t* entry;
    int64_t before;
  } read = {};

  EdgeBlock(const EdgeSparseAttention& a, int64_t b, int64_t h, int64_t unit)
      : Base(a, b, h, a.G), keys(a.Lq) {
    if (unit == 0) return;
    const int32_t* offsets = a.row_offsets + (a.layouts > 1 ? h * (a.blocks + 1) : 0) + unit - 1;
    list = a.columns + offsets[0], list_end = a.columns + offsets[1];
    read.entry = list;
    this->query_begin = a.G + (unit - 1) * a.block_size;
    this->queries = a.length(unit - 1);
    keys = a.G + (list_end - list) * a.block_size;
    for (const int32_t* e = list; e < list_end; ++e) keys -= a.block_size - a.length(*e);
  }
  // Items count (b, h, unit): what a block reads, others of its head have read.
  EdgeBlock(const EdgeSparseAttention& a, int64_t index)
      : EdgeBlock(a, index / (a.blocks + 1) / a.H, index / (a.blocks + 1) % a.H, index % (a.blocks + 1)) {}

  // Calls f(first row, count, keys before) for the pieces of `count` keys from `first` on.
  template <class F>
  VATTN_INLINE void pieces(int64_t first, int64_t count, F f) const {
    if (!list) return f(first, count, 0);
    int64_t done = 0;
    if (first < a.G) f(first, done = least(count, a.G - first), 0);
    while (done < count) {
      int64_t inside = seek(first + done);
      int64_t piece = least(count - done, a.length(*read.entry) - inside);
      f(a.G + *read.entry * a.block_size + inside, piece, done);
      done += piece;
    }
  }
  // Moves to the block that holds a key that is not global; returns the key's place in it.
  int64_t seek(int64_t key) const {
    int64_t place = key - a.G;
    if (place < read.before) read = {list, 0};
    while (place - read.before >= a.length(*read.entry)) read.before += a.length(*read.entry++);
    return place - read.before;
  }
  void load_pieces(const Video& x, int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](int64_t row, int64_t n, int64_t done) {
      this->load_rows(x, row, n, rows + done * ld, ld, times);
    });
  }
  void load_key(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(a.key, first, count, rows, ld, times);
  }
  void load_value(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(a.value, first, count, rows, ld, times);
  }
  void load_key_tangent(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(a.key_tangent, first, count, rows, ld, times);
  }
  void load_value_tangent(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(a.value_tangent, first, count, rows, ld, times);
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    pieces(first, count, [&](int64_t row, int64_t n, int64_t done) {
      for (int64_t i = 0; i < n; ++i) tokens[done + i] = (uint32_t)(row + i);
    });
  }
  // Of all keys, as they lie; what a slice of the queries gives is a float and lies behind that of the slices before.
  void store_grad(Video grad, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    if (a.slices == 1) return this->template store_rows<T>(grad, first, count, rows, ld, times);
    grad.data = (float*)grad.data + slice * a.slice_grad;
    this->template store_rows<float>(grad, first, count, rows, ld, times);
  }

  // Scores of the first global query are kept on the way.
  void adjust_scores(int64_t first, int64_t count, int64_t k0, int64_t keys, float* scores) const {
    Base::adjust_scores(first, count, k0, keys, scores);
    if (!list && first == 0 && a.importance)
      for (int64_t k = k0 < a.G ? a.G - k0 : 0; k < keys; ++k)
        a.importance[(b * a.H + h) * (a.Lq - a.G) + k0 + k - a.G] = scores[k];
  }
  void adjust_grads(int64_t, int64_t count, int64_t, int64_t, const float* grads) const {
    if (!a.positions.table) return;
    float* to = a.grad_bias + ((slice * a.B + b) * a.H + h) * a.positions.table_head;
    this->accumulate_bias(to, count, grads);
  }
};

// The backward of a share of a head's blocks: the queries of one after the other, and the gradients of all keys kept.
template <class T>
void edge_backward_items(const EdgeSparseAttention& a, int64_t begin, int64_t end, float* workspace) {
  const BackwardWorkspace w(a.D, a.chunk, a.chunk + 1, a.Lq, workspace);
  const int64_t ld = w.ld, units = a.blocks + 1, share = (units + a.slices - 1) / a.slices;
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % a.H, b = item / a.H % a.B, slice = item / a.H / a.B;
    const bool fresh = slice == 0 && a.G > 0;  // the global queries, which come first, read all keys
    if (!fresh) zero(w.grad_key, a.Lq * ld), zero(w.grad_value, a.Lq * ld);
    for (int64_t unit = slice * share; unit < least(slice * share + share, units); ++unit) {
      EdgeBlock<T> it(a, b, h, unit);
      it.slice = slice;
      for (int64_t q0 = 0; q0 < it.queries; q0 += a.chunk) {
        int64_t held = least(a.chunk, it.queries - q0);
        w.hold(it, q0, held, false);
        for (int64_t k0 = 0; k0 < it.keys; k0 += TILE) {
          int64_t keys = least(TILE, it.keys - k0);
          backward_tile<true, true>(it, k0, keys, q0, held, w, fresh && unit == 0 && q0 == 0, [&](auto piece) { it.pieces(k0, keys, piece); });
        }
        it.store_grad_query(q0, held, w.grad_query, ld, it.scale);
      }
    }
    EdgeBlock<T> all(a, b, h, 0);
    all.slice = slice;
    all.store_grad(a.grad_key, 0, a.Lq, w.grad_key, ld, LN2);  // as in flash.h
    all.store_grad(a.grad_value, 0, a.Lq, w.grad_value, ld, 1);
  }
}

}  // namespace VATTN_ISA
}  // namespace vattn
