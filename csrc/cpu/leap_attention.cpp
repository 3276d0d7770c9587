// vattn::leap_attention, its backward and its tangent on the CPU.
#include "host_attention.h"

namespace vattn {
namespace {

struct LeapCall : AttentionCall<LeapAttention> {
  LeapCall(const Tensor& query, const Tensor& key, const Tensor& value, int64_t leap, int64_t group_size,
           int64_t fold_div, double dropout_p, const MaybeTensor& seed, double scale)
      : AttentionCall("leap_attention", kernels().leap_attention, 5, Tokens::OfQuery, query, key, value, dropout_p,
                      seed, scale) {
    check_range(op, "leap", leap, 1), check_range(op, "group_size", group_size, 1);
    check_range(op, "fold_div", fold_div, 0);
    a.T = query.size(2), a.N = query.size(3);
    a.leap = std::min(leap, std::max<int64_t>(a.T, 1));
    a.group_size = std::min(group_size, std::max<int64_t>(a.T, 1));
    a.fold = fold_div > 0 ? a.D / fold_div : 0;
    a.components = a.B * a.H * a.groups();
    a.max_queries = a.max_keys = a.group_size * a.N;
  }
};

using Leap = AttentionOperator<LeapCall, Tensor, int64_t, int64_t, int64_t, double, const MaybeTensor&, double>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_ATTENTION(m, "leap_attention", Leap); }

}  // namespace vattn
