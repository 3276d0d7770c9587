// vattn::nearest_code on the CPU.
#include <cfloat>
#include <cmath>

#include "host.h"

namespace vattn {
namespace {

Tensor nearest_code(const Tensor& x_, const Tensor& codebook_) {
  const char* op = "nearest_code";
  NearestCode a{};
  a.dtype = dtype_of(op, "x", x_);
  check_value(x_.dim() >= 1 && x_.size(-1) >= 1, op, ": x must have shape (..., C), C at least 1, got x.shape=",
              x_.sizes());
  check_tensor(op, "codebook", codebook_, {ANY, x_.size(-1)}, x_.scalar_type());
  check_value(codebook_.size(0) >= 1, op, ": codebook must have at least one code, got codebook.shape=",
              codebook_.sizes());
  Tensor index = empty(x_.sizes().slice(0, x_.dim() - 1), ScalarType::Long);
  if (index.numel() == 0) return index;
  Tensor x = x_.dim() - 1 <= NearestCode::MAX_AXES ? x_ : torch::stable::reshape(x_, {-1, x_.size(-1)});
  Tensor codebook = with_rows(codebook_);
  a.vectors = index.numel(), a.C = x.size(-1), a.K = codebook.size(0);
  a.x = x.const_data_ptr(), a.codebook = codebook.const_data_ptr();
  a.axes = x.dim() - 1;
  for (int64_t axis = 0; axis < a.axes; ++axis) a.sizes[axis] = x.size(axis), a.steps[axis] = x.stride(axis);
  a.channel = x.stride(-1), a.code_step = codebook.stride(0);
  a.index = index.mutable_data_ptr<int64_t>();

  const Kernels& k = kernels();
  Tensor center = empty({a.C}, ScalarType::Float), half_squares = empty({a.K}, ScalarType::Float);
  a.center = floats(center), a.half_squares = floats(half_squares);
  run(k.center_codes, a, a.C, a.C);
  run(k.square_codes, a, a.K, a.C);

  float most = 0;
  for (int64_t i = 0; i < a.K; ++i)
    if (std::isfinite(a.half_squares[i])) most = std::max(most, a.half_squares[i]);
  a.longest = std::sqrt(2 * most);
  // A product is the sum of C rounded terms, in runs of `long_sum`; the two differences and the square round, too.
  a.tolerance = FLT_EPSILON * a.longest * (float)(std::min(a.C, k.long_sum) + parts(a.C, k.long_sum) + 8);
  a.panels = std::clamp<int64_t>(CACHED_FLOATS / (k.tile * a.C), 1, parts(a.vectors, 2 * num_threads() * k.tile));
  run(k.nearest_code, a, parts(a.vectors, a.panels * k.tile), k.nearest_workspace(a.C, a.panels));
  return index;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_OPERATOR(m, "nearest_code", nearest_code); }

}  // namespace vattn
