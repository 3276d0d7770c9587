// The Python module vattn._C. Importing it registers the CPU kernels with PyTorch's dispatcher (each operator's file
// in csrc/cpu does so for itself); the schemas are defined in vattn/ops, where they exist without a compiler too.
#include <torch/extension.h>

#include "cpu/kernels.h"
#ifdef VATTN_CUDA
#include "cuda/operators.h"
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of vattn.";
  m.def(
      "cpu_capability", [] { return vattn::kernels().name; },
      "The instruction set that the CPU kernels use: avx512, avx2 or generic.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (const vattn::Kernels* kernels : vattn::available_kernels()) names.push_back(kernels->name);
        return names;
      },
      "The instruction sets that they could use on this processor, the fastest first.");
#ifdef VATTN_CUDA
  m.def("select_tokens", &vattn::cuda::select_tokens, "The CUDA kernel of vattn::select_tokens.");
#endif
}
