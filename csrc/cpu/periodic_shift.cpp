// vattn::periodic_shift on the CPU.
#include "host.h"

namespace vattn {
namespace {

Tensor shift(const Tensor& x_, int64_t fold_div, bool transpose) {
  const char* op = "periodic_shift";
  PeriodicShift a{};
  a.dtype = dtype_of(op, "x", x_);
  check_tensor(op, "x", x_, {ANY, ANY, ANY, ANY, ANY}, x_.scalar_type());
  check_range(op, "fold_div", fold_div, 1);
  checked_product(op, "x.shape", x_.sizes());
  Tensor x = with_rows(x_), out = empty_rows(x);
  a.B = x.size(0), a.H = x.size(1), a.T = x.size(2), a.N = x.size(3), a.D = x.size(4);
  a.fold = a.D / fold_div;
  a.transpose = transpose;
  a.x = strided(x), a.out = strided(out);
  run(kernels().periodic_shift, a, a.B * a.H * a.T * a.N);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_OPERATOR(m, "periodic_shift", shift); }

}  // namespace vattn
