// Node-sparse attention's itinerary: the queries of one batch and head, and those keys that were kept.
//
//     key     0  1  2  3  4  5  6  7          row 2 of the keys is key 5
//     kept       1        4  5     7
#pragma once

#include "itinerary.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct KeptKeys : TokenItinerary<T, NodeSparseAttention> {
  using Base = TokenItinerary<T, NodeSparseAttention>;
  using Base::a, Base::h;
  int64_t keys;
  const int64_t* kept;

  KeptKeys(const NodeSparseAttention& a, int64_t index)
      : Base(a, index / a.H, index % a.H, a.Lq), keys(a.length(index / a.H)),
        kept(a.kept + index / a.H * a.max_keys) {}

  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i) {
      if (first + i + AHEAD < keys) prefetch(this->template at<const T>(x, kept[first + i + AHEAD]), this->head_dim);
      zero_end(rows + i * ld, ld);
      copy(rows + i * ld, this->template at<const T>(x, kept[first + i]), this->head_dim, times);
    }
  }
  void store_keys(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    if (a.compact) return this->template store_rows<float>(x, first, count, rows, ld, times);
    for (int64_t i = 0; i < count; ++i)
      copy(this->template at<T>(x, kept[first + i]), rows + i * ld, this->head_dim, times);
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)kept[first + i];
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
