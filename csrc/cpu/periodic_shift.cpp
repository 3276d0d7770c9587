// vattn::periodic_shift on the CPU.
#include <torch/library.h>

#include "host.h"

namespace vattn {
namespace {

at::Tensor shift(const at::Tensor& x_, int64_t fold_div, bool transpose) {
  at::Tensor x = with_rows(x_), out = empty_rows(x);
  PeriodicShift a{};
  a.dtype = dtype_of("periodic_shift", x);
  TORCH_CHECK_VALUE(fold_div >= 1, "periodic_shift: fold_div must be at least 1, got fold_div=", fold_div);
  a.B = x.size(0), a.H = x.size(1), a.T = x.size(2), a.N = x.size(3), a.D = x.size(4);
  a.fold = a.D / fold_div;
  a.transpose = transpose;
  a.x = video(x), a.out = video(out);
  run(kernels().periodic_shift, a, a.B * a.H * a.T * a.N);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) { m.impl("periodic_shift", shift); }

}  // namespace vattn
