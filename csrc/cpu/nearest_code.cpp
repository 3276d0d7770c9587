// vattn::nearest_code on the CPU.
#include <torch/library.h>

#include <cfloat>
#include <cmath>

#include "host.h"

namespace vattn {
namespace {

at::Tensor nearest_code(const at::Tensor& x_, const at::Tensor& codebook_) {
  const char* op = "nearest_code";
  TORCH_CHECK_VALUE(x_.dim() >= 1 && codebook_.dim() == 2 && codebook_.size(1) == x_.size(-1) && codebook_.numel() > 0,
                    op, ": x must be (..., C) and codebook (K, C), K and C at least 1");
  TORCH_CHECK_TYPE(x_.scalar_type() == codebook_.scalar_type(), op, ": x and codebook must have one dtype");
  at::Tensor index = at::empty(x_.sizes().slice(0, x_.dim() - 1), x_.options().dtype(at::kLong));
  NearestCode a{};
  a.dtype = dtype_of(op, x_);
  if (index.numel() == 0) return index;
  at::Tensor x = x_.dim() - 1 <= NearestCode::MAX_AXES ? x_ : x_.reshape({-1, x_.size(-1)});
  at::Tensor codebook = with_rows(codebook_);
  a.vectors = index.numel(), a.C = x.size(-1), a.K = codebook.size(0);
  a.x = x.const_data_ptr(), a.codebook = codebook.const_data_ptr();
  a.axes = x.dim() - 1;
  for (int64_t axis = 0; axis < a.axes; ++axis) a.sizes[axis] = x.size(axis), a.steps[axis] = x.stride(axis);
  a.channel = x.stride(-1), a.code_step = codebook.stride(0);
  a.index = index.data_ptr<int64_t>();

  const Kernels& k = kernels();
  at::Tensor center = at::empty({a.C}, codebook.options().dtype(at::kFloat));
  at::Tensor half_squares = at::empty({a.K}, center.options());
  a.center = center.data_ptr<float>(), a.half_squares = half_squares.data_ptr<float>();
  run(k.center_codes, a, a.C, a.C);
  run(k.square_codes, a, a.K, a.C);

  float most = 0;
  for (int64_t i = 0; i < a.K; ++i)
    if (std::isfinite(a.half_squares[i])) most = std::max(most, a.half_squares[i]);
  a.longest = std::sqrt(2 * most);
  // A product is the sum of C rounded terms, in runs of `long_sum`; the two differences and the square round, too.
  a.tolerance = FLT_EPSILON * a.longest * (float)(std::min(a.C, k.long_sum) + parts(a.C, k.long_sum) + 8);
  a.panels = std::clamp<int64_t>(CACHED_FLOATS / (k.tile * a.C), 1, parts(a.vectors, 2 * at::get_num_threads() * k.tile));
  run(k.nearest_code, a, parts(a.vectors, a.panels * k.tile), k.nearest_workspace(a.C, a.panels));
  return index;
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) { m.impl("nearest_code", nearest_code); }

}  // namespace vattn
