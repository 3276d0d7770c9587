// The Python module vattn._C. Importing it registers the CPU kernels with PyTorch's dispatcher (each operator's file
// in csrc/cpu does so for itself); the schemas are defined in vattn/ops, where they exist without a compiler too.
#undef TORCH_TARGET_VERSION  // of the stable ABI, which this file does not use: the pybind11 of PyTorch 2.11 refuses it
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

namespace vattn {

// The one thing that the kernels need of Python: see cpu/host.h.
[[noreturn]] void raise_type_error(const std::string& message) { throw pybind11::type_error(message); }

}  // namespace vattn

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of vattn.";
  m.def(
      "cpu_capability", [] { return vattn::kernels().name; },
      "The instruction set that the CPU kernels use: amx, avx512, avx2 or generic.");
  m.def(
      "cpu_capabilities",
      [] {
        pybind11::list names;
        for (const vattn::Kernels* kernels : vattn::available_kernels()) names.append(kernels->name);
        return names;
      },
      "The instruction sets that they could use on this processor, the fastest first.");
  m.def(
      "kinds_of_arguments",
      [](const std::string& name) {
        auto found = vattn::signatures().find(name);
        return found == vattn::signatures().end() ? std::string() : found->second;
      },
      "What an operator takes, such as \"Tensor, int\"; nothing for one that is not here.");
}
