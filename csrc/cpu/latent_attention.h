// Latent attention's itinerary: the queries of one batch and head, and keys in segments that lie apart.
//
//     keys   |--- latents ---|-------- context --------|     row 300 is row 44 of the second segment
//            0              256                      8448
#pragma once

#include "work.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct LatentHead {
  const LatentAttention& a;
  int64_t b, h, split, key_begin, head_dim, queries, keys;
  float scale;
  Dropout weights_dropout;
  const Dropout* dropout;

  LatentHead(const LatentAttention& a, int64_t index)
      : a(a), head_dim(a.D), queries(a.Lq), scale(a.scale), weights_dropout(0, 0, 0), dropout(nullptr) {
    h = index % a.H;
    b = index / a.H % a.B;
    split = index / a.H / a.B;
    int64_t all = a.key_lengths ? a.key_lengths[b] : a.max_keys;
    int64_t share = round_up((all + a.splits - 1) / a.splits, TILE);
    key_begin = least(split * share, all);
    keys = least(share, all - key_begin);
    if (a.dropout_p > 0) {
      weights_dropout = Dropout(a.dropout_p, a.seed, b * a.H + h);
      dropout = &weights_dropout;
    }
  }
  LatentHead(const LatentHead&) = delete;  // `dropout` points into this object

  template <class U>
  U* at(const Video& x, int64_t token) const {
    return (U*)x.data + b * x.batch + h * x.head + token * x.token;
  }

  // Calls f(segment, its first token, count, rows before) for the pieces of `count` keys from `first` on.
  template <class F>
  VATTN_INLINE void pieces(int64_t first, int64_t count, F f) const {
    first += key_begin;
    int64_t done = 0;
    for (const Segment* s = a.segments; done < count; ++s) {
      int64_t token = first + done - s->first;
      if (token >= s->count) continue;
      int64_t piece = least(count - done, s->count - token);
      f(*s, token, piece, done);
      done += piece;
    }
  }

  void load_rows(const Video& x, int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = at<const T>(x, first + i);
      store(rows + i * ld + ld - VL, Vec{});
      prefetch(row + AHEAD * x.token, head_dim);
      copy(rows + i * ld, row, head_dim, times);
    }
  }
  template <class U>
  void store_rows(const Video& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i) copy(at<U>(x, first + i), rows + i * ld, head_dim, times);
  }

  void load_key(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      load_rows(s.key, token, n, rows + before * ld, ld, times);
    });
  }
  void load_value(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      load_rows(s.value, token, n, rows + before * ld, ld, times);
    });
  }
  void store_grad_key(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      store_rows<T>(s.grad_key, token, n, rows + before * ld, ld, times);
    });
  }
  void store_grad_value(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      store_rows<T>(s.grad_value, token, n, rows + before * ld, ld, times);
    });
  }

  void load_query(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.query, first, count, rows, ld, times);
  }
  void load_out(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.out, first, count, rows, ld, times);
  }
  void load_grad_out(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.grad_out, first, count, rows, ld, times);
  }
  void store_grad_query(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_rows<T>(a.grad_query, first, count, rows, ld, times);
  }
  void store_out(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    if (a.splits == 1) return store_rows<T>(a.out, first, count, rows, ld, times);
    Video part = a.out;
    part.data = (float*)part.data + split * a.split_out;
    store_rows<float>(part, first, count, rows, ld, times);
  }

  void query_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(first + i);
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(key_begin + first + i);
  }

  float* sums(float* of, int64_t first) const { return of + (b * a.H + h) * a.Lq + first; }
  void load_lse(int64_t first, int64_t count, float* x) const { copy(x, sums(a.lse, first), count); }
  void load_delta(int64_t first, int64_t count, float* x) const { copy(x, sums(a.delta, first), count); }
  void store_lse(int64_t first, int64_t count, const float* x) const {
    copy(sums(a.lse + split * a.split_lse, first), x, count);
  }
  void add_delta(int64_t first, int64_t count, const float* x) const {
    for (int64_t i = 0; i < count; ++i) sums(a.delta, first)[i] += x[i];
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
