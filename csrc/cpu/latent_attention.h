// Latent attention's itinerary: the queries of one batch and head, and keys in segments that lie apart.
//
//     keys   |--- latents ---|-------- context --------|     row 300 is row 44 of the second segment
//            0              256                      8448
#pragma once

#include "itinerary.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct LatentHead : TokenItinerary<T, LatentAttention> {
  using Base = TokenItinerary<T, LatentAttention>;
  using Base::a, Base::b, Base::h;
  int64_t split, key_begin, keys;

  LatentHead(const LatentAttention& a, int64_t index)
      : Base(a, index / a.H % a.B, index % a.H, a.Lq), split(index / a.H / a.B) {
    int64_t all = a.key_lengths ? a.key_lengths[b] : a.max_keys;
    int64_t share = round_up((all + a.splits - 1) / a.splits, TILE);
    key_begin = least(split * share, all);
    keys = least(share, all - key_begin);
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

  void load_pieces(Video Segment::*x, int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      this->load_rows(s.*x, token, n, rows + before * ld, ld, times);
    });
  }
  void load_key(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(&Segment::key, first, count, rows, ld, times);
  }
  void load_value(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(&Segment::value, first, count, rows, ld, times);
  }
  void load_key_tangent(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(&Segment::key_tangent, first, count, rows, ld, times);
  }
  void load_value_tangent(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_pieces(&Segment::value_tangent, first, count, rows, ld, times);
  }
  void store_grad_key(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      this->template store_rows<T>(s.grad_key, token, n, rows + before * ld, ld, times);
    });
  }
  void store_grad_value(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](const Segment& s, int64_t token, int64_t n, int64_t before) {
      this->template store_rows<T>(s.grad_value, token, n, rows + before * ld, ld, times);
    });
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(key_begin + first + i);
  }

  // What a split of the keys gives is a float and lies behind that of the splits before.
  void store_split(Video x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    if (a.splits == 1) return this->template store_rows<T>(x, first, count, rows, ld, times);
    x.data = (float*)x.data + split * a.split_out;
    this->template store_rows<float>(x, first, count, rows, ld, times);
  }
  void store_out(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_split(a.out, first, count, rows, ld, times);
  }
  void store_out_tangent(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_split(a.out_tangent, first, count, rows, ld, times);
  }
  void store_lse(int64_t first, int64_t count, const float* x) const {
    copy(this->sums(a.lse + split * a.split_lse, first), x, count);
  }
  void store_lse_tangent(int64_t first, int64_t count, const float* x) const {
    copy(this->sums(a.lse_tangent + split * a.split_lse, first), x, count);
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
