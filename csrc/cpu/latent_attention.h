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
    for (int64_t segment = 0, begin = 0, end, done = 0; done < count; ++segment, begin = end) {
      end = a.segment_ends[segment];
      int64_t token = first + done - begin, piece = least(count - done, end - first - done);
      if (piece <= 0) continue;
      f(segment, token, piece, done);
      done += piece;
    }
  }
  template <class Row>
  void load_keys(const Strided* x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    pieces(first, count, [&](int64_t segment, int64_t token, int64_t n, int64_t before) {
      this->load_rows(x[segment], token, n, rows + before * ld, ld, times);
    });
  }
  void store_keys(const Strided* x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    pieces(first, count, [&](int64_t segment, int64_t token, int64_t n, int64_t before) {
      this->template store_rows<T>(x[segment], token, n, rows + before * ld, ld, times);
    });
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(key_begin + first + i);
  }

  // What a split of the keys gives lies behind that of the splits before.
  void store_outputs(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    this->store_part(x, a.splits, split, a.split_out, first, count, rows, ld, times);
  }
  void store_numbers(float* x, int64_t first, int64_t count, const float* from) const {
    Base::store_numbers(x + split * a.split_lse, first, count, from);
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
