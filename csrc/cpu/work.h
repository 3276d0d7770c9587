// The items of an attention kernel's work, for any operator: Itinerary<T>(args, component) tells where its rows live.
//
// Forward and tangent, components come before their tiles: neighbours among them are heads, whose rows lie on the same
// pages.
#pragma once

#include "flash.h"

namespace vattn {
namespace VATTN_ISA {

// Runs work(itinerary, first query, count) for the items of panels of `rows` queries of a component.
template <class Itinerary, class Args, class Work>
VATTN_INLINE void panel_items(const Args& a, int64_t begin, int64_t end, int64_t rows, Work work) {
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item % a.components);
    int64_t first = item / a.components * rows;
    if (first < it.queries) work(it, first, least(rows, it.queries - first));
  }
}

template <class Itinerary, class Args>
void forward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, a.panels * TILE, [&](const Itinerary& it, int64_t first, int64_t count) {
    forward(it, first, count, workspace);
  });
}

template <class Itinerary, class Args>
void tangent_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, a.panels * TILE, [&](const Itinerary& it, int64_t first, int64_t count) {
    tangent(it, first, count, workspace);
  });
}

template <class Itinerary, class Args>
void delta_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  panel_items<Itinerary>(a, begin, end, TILE, [&](const Itinerary& it, int64_t first, int64_t count) {
    delta(it, first, count, workspace);
  });
}

template <class Itinerary, class Args>
void backward_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item);
    const BackwardWorkspace w(a.D, a.chunk, it.queries, it.keys, workspace);
    backward_or_parts<true, true>(it, a.chunk, 0, it.queries, 0, it.keys, w);
  }
}

// Where components share keys: a slice of the units of a head after each other, the gradients of all keys kept. Unit 0
// reads all keys, as they lie, and so leaves none that hold nothing.
template <class Itinerary, class Args>
void backward_shared_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const BackwardWorkspace w(a.D, a.chunk, a.chunk + 1, a.max_keys, workspace);
  const int64_t share = (a.units() + a.slices - 1) / a.slices;
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % a.H, b = item / a.H % a.B, slice = item / a.H / a.B;
    const Itinerary all(a, b, h, 0, slice);
    auto each_unit = [&](bool fresh, auto f) {
      if (!fresh) zero(w.grad_key, a.max_keys * w.ld), zero(w.grad_value, a.max_keys * w.ld);
      for (int64_t unit = slice * share; unit < least(slice * share + share, a.units()); ++unit, fresh = false) {
        Itinerary it(a, b, h, unit, slice);
        if (it.queries > 0) f(it, fresh);
      }
    };
    bool parts = false, again = false;
    each_unit(slice == 0 && all.queries > 0, [&](const Itinerary& it, bool fresh) {
      again |= backward<true, true>(it, a.chunk, 0, it.queries, 0, it.keys, w, fresh);
      parts |= it.in_parts();
    });
    if (parts && !again)
      again = !all_finite(w.grad_key, a.max_keys * w.ld) || !all_finite(w.grad_value, a.max_keys * w.ld);
    if (again) {  // what keys, and the bias, have had of any unit may be wrong
      all.forget_bias();
      each_unit(false, [&](const Itinerary& it, bool) {
        auto part_of = [&](const Itinerary& part, int64_t first, int64_t count) {
          backward<true, true>(part, a.chunk, first, first + count, 0, it.keys, w, false);
        };
        if (it.in_parts())
          it.each_part(0, it.queries, part_of);
        else
          part_of(it, 0, it.queries);
      });
    }
    w.store_keys(all, 0, a.max_keys, 0);
  }
}

template <class Itinerary, class Args>
void backward_query_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const BackwardWorkspace w(a.D, a.chunk, a.chunk, 0, workspace);
  int64_t tiles = (a.max_queries + a.chunk - 1) / a.chunk;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * a.chunk, last = least(first + a.chunk, it.queries);
    if (first < last) backward_or_parts<true, false>(it, a.chunk, first, last, 0, it.keys, w);
  }
}

template <class Itinerary, class Args>
void backward_key_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const BackwardWorkspace w(a.D, a.chunk, a.max_queries, TILE, workspace);
  int64_t tiles = (a.max_keys + TILE - 1) / TILE;
  for (int64_t item = begin; item < end; ++item) {
    Itinerary it(a, item / tiles);
    int64_t first = item % tiles * TILE, last = least(first + TILE, it.keys);
    if (first < last) backward_or_parts<false, true>(it, a.chunk, 0, it.queries, first, last, w);
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
