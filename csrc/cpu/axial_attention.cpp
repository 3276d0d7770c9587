// vattn::axial_attention, its backward and its tangent on the CPU.
#include "host_attention.h"

namespace vattn {
namespace {

struct AxialCall : AttentionCall<AxialAttention> {
  AxialCall(const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p, const MaybeTensor& seed,
            double scale)
      : AttentionCall("axial_attention", kernels().axial_attention, 6, Tokens::OfQuery, query, key, value,
                      dropout_p, seed, scale) {
    a.outer = query.size(2), a.line = query.size(3), a.inner = query.size(4);
    constexpr int64_t ROWS_WORTH_A_PANEL = 16;  // products of fewer rows take as long
    a.lines = std::max<int64_t>(1, ROWS_WORTH_A_PANEL / std::max<int64_t>(a.line, 1));
    a.components = a.B * a.H * parts(a.outer * a.inner, a.lines);
    a.max_queries = a.max_keys = a.lines * a.line;
  }
};

using Axial = AttentionOperator<AxialCall, Tensor, double, const MaybeTensor&, double>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_ATTENTION(m, "axial_attention", Axial); }

}  // namespace vattn
