// The Python module vattn._C_cuda. Importing it registers the operators of operators.cpp with PyTorch's dispatcher.
#undef TORCH_TARGET_VERSION  // of the stable ABI, which this file does not use: the pybind11 of PyTorch 2.11 refuses it
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "Compiled CUDA C++ kernels of vattn."; }
