// The exception of C++ that becomes Python's TypeError where PyTorch calls an operator is pybind11's. The header below
// defines it without the rest of pybind11, which is more than the limited API of Python: see bindings.cpp.
#undef TORCH_TARGET_VERSION  // of the stable ABI, which this file does not use: the pybind11 of PyTorch 2.11 refuses it
#undef Py_LIMITED_API
#include <pybind11/detail/common.h>

#include <string>

namespace vattn {

[[noreturn]] void raise_type_error(const std::string& message) { throw pybind11::type_error(message); }

}  // namespace vattn
