// The kernels of one instruction set, as a table. Included once by each isa_*.cpp, below its target pragma.
#include "leap_attention.h"
#include "rows.h"

namespace vattn {
namespace VATTN_ISA {

// Picks the instance of a kernel template for the dtype of its arguments.
#define VATTN_BY_DTYPE(kernel, args, ...)                                        \
  switch ((args).dtype) {                                                        \
    case Dtype::Float32: return kernel<float>(args, __VA_ARGS__);                \
    case Dtype::BFloat16: return kernel<BFloat16>(args, __VA_ARGS__);            \
    case Dtype::Float16: return kernel<Float16>(args, __VA_ARGS__);              \
  }

#define VATTN_LEAP(kernel) \
  [](const LeapAttention& a, int64_t begin, int64_t end, float* workspace) { \
    VATTN_BY_DTYPE(kernel, a, begin, end, workspace)                         \
  }
#define VATTN_ROWS(kernel, Args) \
  [](const Args& a, int64_t begin, int64_t end) { VATTN_BY_DTYPE(kernel, a, begin, end) }

const Kernels& table() {
  static const Kernels kernels = {
      VATTN_NAME,
      TILE,
      [](int64_t head_dim, int64_t panels) { return ForwardWorkspace(head_dim, panels, nullptr).size; },
      [](int64_t head_dim, int64_t chunk, int64_t queries, int64_t keys) {
        return BackwardWorkspace(head_dim, chunk, queries, keys, nullptr).size;
      },
      VATTN_LEAP(leap_forward),
      VATTN_LEAP(leap_delta),
      VATTN_LEAP(leap_backward),
      VATTN_LEAP(leap_backward_query),
      VATTN_LEAP(leap_backward_key),
      VATTN_ROWS(periodic_shift, PeriodicShift),
      VATTN_ROWS(merge_forward, MergeAttention),
      VATTN_ROWS(merge_backward, MergeAttention),
  };
  return kernels;
}

}  // namespace VATTN_ISA
}  // namespace vattn
