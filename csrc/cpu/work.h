// The items of an attention kernel's work, for any operator: Itinerary<T>(args, component) tells where its rows live.
#pragma once

#include "flash.h"

namespace vattn {
namespace VATTN_ISA {

template <class Itinerary, class Args>
void forward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  int64_t rows = a.panels * TILE, tiles = (a.max_queries + rows - 1) / rows;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * rows;
    if (first < it.queries) forward(it, first, least(rows, it.queries - first), workspace);
  }
}

template <class Itinerary, class Args>
void delta_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  for (int64_t item = begin; item < end; ++item) delta(Itinerary(a, item), workspace);
}

template <class Itinerary, class Args>
void backward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item);
    backward<true, true>(it, a.chunk, 0, it.queries, 0, it.keys, workspace);
  }
}

template <class Itinerary, class Args>
void backward_query_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  int64_t tiles = (a.max_queries + a.chunk - 1) / a.chunk;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * a.chunk, last = least(first + a.chunk, it.queries);
    if (first < last) backward<true, false>(it, a.chunk, first, last, 0, it.keys, workspace);
  }
}

template <class Itinerary, class Args>
void backward_key_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  int64_t tiles = (a.max_keys + TILE - 1) / TILE;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * TILE, last = least(first + TILE, it.keys);
    if (first < last) backward<false, true>(it, a.chunk, 0, it.queries, first, last, workspace);
  }
}

// A kernel's instance for the dtype of its arguments.
template <template <class> class Itinerary, class Args>
AttentionKernels<Args> attention_kernels() {
#define VATTN_BY_DTYPE(kernel)                                                              \
  [](const Args& a, int64_t begin, int64_t end, float* workspace) {                         \
    switch (a.dtype) {                                                                      \
      case Dtype::Float32: return kernel<Itinerary<float>>(a, begin, end, workspace);       \
      case Dtype::BFloat16: return kernel<Itinerary<BFloat16>>(a, begin, end, workspace);   \
      case Dtype::Float16: return kernel<Itinerary<Float16>>(a, begin, end, workspace);     \
    }                                                                                       \
  }
  return {VATTN_BY_DTYPE(forward_items), VATTN_BY_DTYPE(delta_items), VATTN_BY_DTYPE(backward_items),
          VATTN_BY_DTYPE(backward_query_items), VATTN_BY_DTYPE(backward_key_items)};
#undef VATTN_BY_DTYPE
}

}  // namespace VATTN_ISA
}  // namespace vattn
