// Between PyTorch's tensors and the kernels: what every operator's CPU side needs. Of PyTorch it has the stable ABI
// alone, so that one build serves every later version.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace vattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The name of an argument, or of an element of a list.
struct Name {
  const char* name;
  int64_t index = -1;
  Name(const char* name, int64_t index = -1) : name(name), index(index) {}
};

constexpr int64_t ANY = -1;  // a size that may be any

template <class T>
void print(std::ostream& to, const T& x) { to << x; }
inline void print(std::ostream& to, ScalarType dtype) { to << torch::headeronly::toString(dtype); }
inline void print(std::ostream& to, Sizes sizes) {
  const char* before = "[";
  for (int64_t size : sizes) {
    to << before, before = ", ";
    if (size == ANY) to << "any";
    else to << size;
  }
  to << (sizes.empty() ? "[]" : "]");
}
inline void print(std::ostream& to, Name x) {
  to << x.name;
  if (x.index >= 0) to << '[' << x.index << ']';
}
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream to;
  (print(to, parts), ...);
  return to.str();
}

// What a caller must see to. The errors reach Python as a ValueError and a TypeError: PyTorch calls operators through
// pybind11, which makes them of std::invalid_argument and of an exception of its own: see type_error.cpp.
[[noreturn]] void raise_type_error(const std::string& message);
template <class... Parts>
void check_value(bool holds, const Parts&... parts) {
  if (!holds) throw std::invalid_argument(text(parts...));
}
template <class... Parts>
void check_type(bool holds, const Parts&... parts) {
  if (!holds) raise_type_error(text(parts...));
}

// Argument `name` must be a tensor, which a schema does not see to, and lie on the CPU.
inline void check_here(const char* op, Name name, const Tensor& x) {
  check_value(x.defined() && x.is_cpu(), op, ": ", name, " must be a tensor on the CPU, got ",
              x.defined() ? "one on another device" : "None");
}

// What every tensor that comes from outside is held against, in forward, backward and tangent: argument `name` must have
// these sizes and this dtype. `torch.ops` bypasses the public functions and their checks.
inline void check_tensor(const char* op, Name name, const Tensor& x, Sizes sizes, ScalarType dtype) {
  check_here(op, name, x);
  const Sizes own = x.sizes();
  bool fits = own.size() == sizes.size();
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis) fits = sizes[axis] == ANY || sizes[axis] == own[axis];
  check_value(fits, op, ": ", name, " must have shape ", sizes, ", got ", name, ".shape=", own);
  check_type(x.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype, ", got ", name,
             ".dtype=", x.scalar_type());
}

// Setting `name` must be from `least` to `most`.
inline void check_range(const char* op, Name name, int64_t value, int64_t least,
                        int64_t most = std::numeric_limits<int64_t>::max()) {
  check_value(value >= least, op, ": ", name, " must be at least ", least, ", got ", name, "=", value);
  check_value(value <= most, op, ": ", name, " must be at most ", most, ", got ", name, "=", value);
}

// A product of sizes, where zeros count as ones: so many things must be countable, were there any.
inline int64_t checked_product(const char* op, Name name, Sizes sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    check_value(!__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product), op, ": ", name,
                " must have fewer than 2**63 elements, got ", name, "=", sizes);
  return product;
}

// That of the first argument, which others share.
inline Dtype dtype_of(const char* op, Name name, const Tensor& x) {
  check_here(op, name, x);
  const ScalarType dtype = x.scalar_type();
  check_type(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
             ": the kernels take float32, bfloat16 and float16, got ", name, ".dtype=", dtype);
  return dtype == ScalarType::Float ? Dtype::Float32 : dtype == ScalarType::Half ? Dtype::Float16 : Dtype::BFloat16;
}

// A contiguous tensor of `dtype` with the numbers of x: itself, where it is one.
inline Tensor contiguous(const Tensor& x, ScalarType dtype) {
  Tensor result = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return result.is_contiguous() ? result : torch::stable::contiguous(result);
}

// The kernels read rows whose last axis is contiguous; any other tensor is copied.
inline Tensor with_rows(const Tensor& x) {
  const Sizes sizes = x.sizes();
  return sizes.empty() || sizes.back() <= 1 || x.strides().back() == 1 ? x : torch::stable::contiguous(x);
}

inline float* floats(const Tensor& x) { return x.mutable_data_ptr<float>(); }

// What the kernels take of a tensor (B, H, tokens, D).
inline Strided strided(const Tensor& x) {
  Sizes strides = x.strides();
  Strided result{x.data_ptr(), strides[0], strides[1], 0, 0, 0};
  int64_t* of_tokens[] = {&result.inner, &result.middle, &result.outer};
  for (size_t axis = 2; axis + 1 < strides.size(); ++axis) *of_tokens[strides.size() - 2 - axis] = strides[axis];
  return result;
}

// An empty tensor on the CPU, whose axes `order` lists from the innermost to the outermost in memory.
inline Tensor empty(Sizes sizes, ScalarType dtype, const std::vector<size_t>& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t axis : order) strides[axis] = step, step *= std::max<int64_t>(sizes[axis], 1);
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(Sizes sizes, ScalarType dtype) {
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
  return empty(sizes, dtype, order);
}

// An empty (B, H, ..., D) that lies in memory as (B, ..., H, D), so that merging heads is a view.
inline Tensor empty_rows_of(Sizes sizes, ScalarType dtype) {
  const size_t last = sizes.size() - 1;
  std::vector<size_t> order = {last, 1};
  for (size_t axis = last - 1; axis > 1; --axis) order.push_back(axis);
  order.push_back(0);
  return empty(sizes, dtype, order);
}
inline Tensor empty_rows(const Tensor& like) { return empty_rows_of(like.sizes(), like.scalar_type()); }

// One number for each row of `like`.
inline Tensor empty_numbers(const Tensor& like) {
  return empty(like.sizes().slice(0, like.dim() - 1), ScalarType::Float);
}

// Contiguous floats; a call of PyTorch's, which has threads, takes longer than a few of them.
inline Tensor zeros(Sizes sizes) {
  constexpr int64_t WORTH_A_CALL = 1 << 15;
  Tensor x = empty(sizes, ScalarType::Float);
  if (x.numel() > WORTH_A_CALL) return torch::stable::zero_(x);
  std::fill_n(floats(x), x.numel(), 0.f);
  return x;
}

// What a schema calls the type of an argument. The Python side compares what is registered here with its schemas, as
// PyTorch's own C++ interface does and its stable ABI does not.
template <class T>
constexpr const char* kind_of() {
  if constexpr (std::is_same_v<T, Tensor>) return "Tensor";
  else if constexpr (std::is_same_v<T, Tensors>) return "Tensor[]";
  else if constexpr (std::is_same_v<T, MaybeTensor>) return "Tensor?";
  else if constexpr (std::is_same_v<T, std::vector<int64_t>>) return "int[]";
  else if constexpr (std::is_same_v<T, int64_t>) return "int";
  else if constexpr (std::is_same_v<T, double>) return "float";
  else {
    static_assert(std::is_same_v<T, bool>, "an operator takes no such argument");
    return "bool";
  }
}
template <class Result, class... Args>
std::string kinds_of(Result (*)(Args...)) {
  std::string kinds;
  ((kinds += (kinds.empty() ? "" : ", ") + std::string(kind_of<std::remove_cvref_t<Args>>())), ...);
  return kinds;
}

#define VATTN_OPERATOR(m, name, function)  \
  m.impl(name, TORCH_BOX(function));       \
  vattn::signatures()[name] = kinds_of(function)

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Floats for one call of a kernel. A thread keeps those of a usual call for the next one: memory that malloc hands out
// is fresh as often as not, and a system that clears it page by page takes longer than a small call.
class Workspace {
  struct Delete {
    void operator()(float* x) const { ::operator delete[](x, std::align_val_t(64)); }
  };
  using Floats = std::unique_ptr<float[], Delete>;
  static constexpr int64_t KEPT = 1 << 19;
  Floats own;

  static Floats make(int64_t count) { return Floats(new (std::align_val_t(64)) float[count]); }

 public:
  float* floats;

  explicit Workspace(int64_t count) {
    static thread_local Floats kept;
    static thread_local int64_t size = 0;
    if (count > KEPT) {
      own = make(count), floats = own.get();
      return;
    }
    if (size < count) {
      size = 0, kept.reset();
      kept = make(count), size = count;
    }
    floats = kept.get();
  }
};

// Runs items [0, items) on PyTorch's threads, each of which gets `floats_each` of workspace.
template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t items, int64_t floats_each) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace(floats_each);
    kernel(args, begin, end, workspace.floats);
  });
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t rows) {
  constexpr int64_t ROWS_WORTH_A_THREAD = 256;
  torch::stable::parallel_for(0, rows, ROWS_WORTH_A_THREAD,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

constexpr int64_t CACHED_FLOATS = 1 << 16;  // what an item keeps in the second-level cache

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Numbers of argument `name` from 0 to `most`, which is `limit`: int32, or int64 for either.
template <class Int>
Tensor checked_numbers(const char* op, Name name, const Tensor& x, Sizes sizes, const char* limit, int64_t most) {
  constexpr ScalarType dtype = std::is_same_v<Int, int64_t> ? ScalarType::Long : ScalarType::Int;
  check_here(op, name, x);
  check_tensor(op, name, x, sizes, x.scalar_type() == ScalarType::Int ? ScalarType::Int : dtype);
  const Tensor numbers = contiguous(x, dtype);
  const Int* number = numbers.const_data_ptr<Int>();
  for (int64_t i = 0, end = numbers.numel(); i < end; ++i)
    check_value(0 <= number[i] && number[i] <= most, op, ": ", name, " must be between 0 and ", limit, " (", most,
                "), got ", Name(name.name, i), "=", number[i]);
  return numbers;
}

// How much each sample reads, up to `most`, which is `limit`.
inline Tensor checked_lengths(const char* op, Name name, const Tensor& lengths, int64_t B, const char* limit,
                              int64_t most) {
  return checked_numbers<int64_t>(op, name, lengths, {B}, limit, most);
}
inline Tensor checked_key_lengths(const char* op, const Tensor& lengths, int64_t B, int64_t keys) {
  return checked_lengths(op, "key_lengths", lengths, B, "the number of keys", keys);
}

// Positions of the N tokens, (N,) or (B, N).
inline Tensor checked_positions(const char* op, const Tensor& positions, int64_t B, int64_t N) {
  check_here(op, "positions", positions);
  const int64_t sizes[] = {B, N};
  check_tensor(op, "positions", positions, Sizes(sizes + (positions.dim() == 1), sizes + 2), ScalarType::Long);
  return contiguous(positions, ScalarType::Long);
}

// Attention over a union of key sets from attention over its parts; an operator itself.
std::tuple<Tensor, Tensor> merge_attention(const Tensors& outs, const Tensors& lses);

}  // namespace vattn
