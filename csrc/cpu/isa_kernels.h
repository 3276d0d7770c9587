// The kernels of one instruction set. Included once by each isa_*.cpp, below its target pragma.
#include "axial_attention.h"
#include "edge_sparse_attention.h"
#include "latent_attention.h"
#include "leap_attention.h"
#include "node_sparse_attention.h"
#include "nearest_code.h"
#include "rows.h"
#include "token_importance.h"

namespace vattn {
namespace VATTN_ISA {

// A kernel of rows, in the instance for the dtype of its arguments.
#define VATTN_ROWS(kernel, Args)                                     \
  [](const Args& a, int64_t begin, int64_t end) {                    \
    switch (a.dtype) {                                               \
      case Dtype::Float32: return kernel<float>(a, begin, end);      \
      case Dtype::BFloat16: return kernel<BFloat16>(a, begin, end);  \
      case Dtype::Float16: return kernel<Float16>(a, begin, end);    \
    }                                                                \
  }

const Kernels& isa_kernels() {
  static const Kernels kernels = {
      .name = VATTN_NAME,
      .tile = TILE,
      .long_sum = LONG_SUM,
      .forward_chunk = forward_chunk,
      .forward_workspace = [](int64_t head_dim, int64_t panels, int64_t keys) {
        return ForwardWorkspace(head_dim, panels, keys, nullptr).size;
      },
      .backward_workspace = [](int64_t head_dim, int64_t chunk, int64_t queries, int64_t keys) {
        return BackwardWorkspace(head_dim, chunk, queries, keys, nullptr).size;
      },
      .tangent_workspace =
          [](int64_t head_dim, int64_t panels) { return TangentWorkspace(head_dim, panels, nullptr).size; },
      .leap_attention = attention_kernels<LeapGroup, LeapAttention>(),
      .latent_attention = attention_kernels<LatentHead, LatentAttention>(),
      .edge_sparse_attention = attention_kernels<EdgeBlock, EdgeSparseAttention>(),
      .node_sparse_attention = attention_kernels<KeptKeys, NodeSparseAttention>(),
      .token_importance_sums = VATTN_BY_DTYPE(TokenImportance, forward_items<ImportanceKeys<T>>),
      .token_importance = VATTN_BY_DTYPE(TokenImportance, importance_items<T>),
      .axial_attention = attention_kernels<AxialLines, AxialAttention>(),
      .nearest_workspace =
          [](int64_t channels, int64_t panels) { return NearestWorkspace(channels, panels, nullptr).size; },
      .center_codes = VATTN_BY_DTYPE(NearestCode, center_codes<T>),
      .square_codes = VATTN_BY_DTYPE(NearestCode, square_codes<T>),
      .nearest_code = VATTN_BY_DTYPE(NearestCode, nearest_code<T>),
      .periodic_shift = VATTN_ROWS(periodic_shift, PeriodicShift),
      .merge_forward = VATTN_ROWS(merge_forward, MergeAttention),
      .merge_backward = VATTN_ROWS(merge_backward, MergeAttention),
      .merge_tangent = VATTN_ROWS(merge_tangent, MergeAttention),
  };
  return kernels;
}

}  // namespace VATTN_ISA
}  // namespace vattn
