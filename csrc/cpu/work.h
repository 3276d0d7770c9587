// The items of an attention kernel's work, for any operator: Itinerary<T>(args, component) tells where its rows live.
//
// A backward is that of its workspace: BackwardWorkspace, or another that has what this one has.
//
// Forward and tangent, components come before their tiles: neighbours among them are heads, whose rows lie on the same
// pages.
#pragma once

#include "flash_tangent.h"

namespace vattn {
namespace VATTN_ISA {

// Apart from the itinerary of a component, which so stays in registers.
template <class Itinerary, class Args, class Work>
__attribute__((noinline)) void each_part(const Args& a, int64_t component, int64_t slice, int64_t first, int64_t count,
                                         Work work) {
  if constexpr (Itinerary::SHARES_TILES) Itinerary::each_part(a, component, slice, first, count, work);
}

// Runs work(itinerary, first query, count) for the items of panels of `rows` queries of a component; where it returns
// true, for the parts of those.
template <class Itinerary, class Args, class Work>
VATTN_INLINE void panel_items(const Args& a, int64_t begin, int64_t end, int64_t rows, Work work) {
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item % a.components);
    int64_t first = item / a.components * rows, count = least(rows, it.queries - first);
    if (count > 0 && work(it, first, count)) each_part<Itinerary>(a, item % a.components, 0, first, count, work);
  }
}

template <class Itinerary, class Args>
void forward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, a.panels * TILE, [&](const auto& it, int64_t first, int64_t count) {
    return forward(it, first, count, workspace);
  });
}

template <class Itinerary, class Args>
void tangent_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, a.panels * TILE, [&](const auto& it, int64_t first, int64_t count) {
    return tangent(it, first, count, workspace);
  });
}

template <class Itinerary, class Args>
void delta_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, TILE, [&](const auto& it, int64_t first, int64_t count) {
    delta(it, first, count, workspace);
    return false;
  });
}

template <class Itinerary, class Workspace = BackwardWorkspace, class Args>
void backward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item);
    const Workspace w(a.D, a.chunk, it.queries, it.keys, workspace);
    if (backward<true, true>(it, a.chunk, 0, it.queries, 0, it.keys, w))
      each_part<Itinerary>(a, item, 0, 0, it.queries, [&](const auto& part, int64_t first, int64_t count) {
        backward<true, true>(part, a.chunk, first, first + count, 0, part.keys, w);
      });
  }
}

// Where components share keys: a slice of the units of a head after each other, the gradients of all keys kept. Unit 0
// reads all keys, as they lie, and so leaves none that hold nothing.
template <class Itinerary, class Workspace = BackwardWorkspace, class Args>
void backward_shared_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const Workspace w(a.D, a.chunk, a.chunk + 1, a.max_keys, workspace);
  const int64_t share = (a.units() + a.slices - 1) / a.slices;
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % a.H, b = item / a.H % a.B, slice = item / a.H / a.B;
    const Itinerary all(a, b, h, 0, slice);
    const int64_t first_unit = slice * share, end_unit = least(first_unit + share, a.units());
    auto none_yet = [&] {
      for (float* grad : {w.grad_key, w.grad_value}) zero(grad, a.max_keys * w.ld);
    };
    bool fresh = slice == 0 && all.queries > 0, shares = false, again = false;
    if (!fresh) none_yet();
    for (int64_t unit = first_unit; unit < end_unit; ++unit, fresh = false) {
      Itinerary it(a, b, h, unit, slice);
      if (it.queries == 0) continue;
      again |= backward<true, true>(it, a.chunk, 0, it.queries, 0, it.keys, w, fresh);
      shares |= it.shares_tiles();
    }
    if (shares)
      for (const float* grad : {w.grad_key, w.grad_value}) again |= !all_finite(grad, a.max_keys * w.ld);
    if (again) {  // what keys, and the bias, have had of any unit may be wrong
      none_yet(), all.forget_bias();
      for (int64_t unit = first_unit; unit < end_unit; ++unit)
        each_part<Itinerary>(a, (b * a.H + h) * a.units() + unit, slice, 0, Itinerary(a, b, h, unit, slice).queries,
                             [&](const auto& part, int64_t first, int64_t count) {
                               backward<true, true>(part, a.chunk, first, first + count, 0, part.keys, w, false);
                             });
    }
    w.store_keys(all, 0, a.max_keys, 0);
  }
}

template <class Itinerary, class Workspace = BackwardWorkspace, class Args>
void backward_query_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const Workspace w(a.D, a.chunk, a.chunk, 0, workspace);
  int64_t tiles = (a.max_queries + a.chunk - 1) / a.chunk;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * a.chunk, last = least(first + a.chunk, it.queries);
    if (first < last && backward<true, false>(it, a.chunk, first, last, 0, it.keys, w))
      each_part<Itinerary>(a, item / tiles, 0, first, last - first, [&](const auto& part, int64_t begin, int64_t count) {
        backward<true, false>(part, a.chunk, begin, begin + count, 0, part.keys, w);
      });
  }
}

template <class Itinerary, class Workspace = BackwardWorkspace, class Args>
void backward_key_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const Workspace w(a.D, a.chunk, a.max_queries, TILE, workspace);
  int64_t tiles = (a.max_keys + TILE - 1) / TILE;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * TILE, last = least(first + TILE, it.keys);
    if (first < last && backward<false, true>(it, a.chunk, 0, it.queries, first, last, w))
      each_part<Itinerary>(a, item / tiles, 0, 0, it.queries, [&](const auto& part, int64_t begin, int64_t count) {
        backward<false, true>(part, a.chunk, begin, begin + count, first, last, w);
      });
  }
}

// A kernel's instance for the dtype of its arguments; `kernel` names it in terms of that dtype, T.
#define VATTN_BY_DTYPE(Args, ...)                                                              \
  [](const Args& a, int64_t begin, int64_t end, float* workspace) {                            \
    auto kernel = [&]<class T>() { __VA_ARGS__(a, begin, end, workspace); };                   \
    switch (a.dtype) {                                                                         \
      case Dtype::Float32: return kernel.template operator()<float>();                         \
      case Dtype::BFloat16: return kernel.template operator()<BFloat16>();                     \
      case Dtype::Float16: return kernel.template operator()<Float16>();                       \
    }                                                                                          \
  }

template <template <class> class Itinerary, class Args>
AttentionKernels<Args> attention_kernels() {
  AttentionKernels<Args> kernels{};
  kernels.forward = VATTN_BY_DTYPE(Args, forward_items<Itinerary<T>>);
  kernels.tangent = VATTN_BY_DTYPE(Args, tangent_items<Itinerary<T>>);
  if constexpr (Itinerary<float>::SHARES_KEYS) {
    kernels.backward = VATTN_BY_DTYPE(Args, backward_shared_items<Itinerary<T>>);
  } else {
    kernels.backward = VATTN_BY_DTYPE(Args, backward_items<Itinerary<T>>);
    kernels.delta = VATTN_BY_DTYPE(Args, delta_items<Itinerary<T>>);
    kernels.backward_query = VATTN_BY_DTYPE(Args, backward_query_items<Itinerary<T>>);
    kernels.backward_key = VATTN_BY_DTYPE(Args, backward_key_items<Itinerary<T>>);
  }
  return kernels;
}

}  // namespace VATTN_ISA
}  // namespace vattn
