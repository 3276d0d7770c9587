// The Python module vattn._C. Importing it registers the CPU kernels with PyTorch's dispatcher (each operator's file
// in csrc/cpu does so for itself); the schemas are defined in vattn/ops, where they exist without a compiler too.
//
// Of Python it uses the limited API of 3.11, so that one build serves every later version.
#ifdef Py_LIMITED_API  // setup.py asks for it, PyTorch defines it to be the oldest that it supports itself
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/kernels.h"

namespace vattn {
namespace {

PyObject* text(const std::string& x) { return PyUnicode_FromStringAndSize(x.data(), (Py_ssize_t)x.size()); }

// What `make` returns, or a RuntimeError with the message of the exception that it throws.
template <class Make>
PyObject* guarded(Make make) {
  try {
    return make();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return guarded([] { return text(kernels().name); });
}

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  return guarded([] {
    PyObject* names = PyList_New(0);
    for (const Kernels* kernels : available_kernels()) {
      PyObject* name = names == nullptr ? nullptr : text(kernels->name);
      if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
      Py_XDECREF(name);
    }
    return names;
  });
}

PyObject* kinds_of_arguments(PyObject*, PyObject* name) {
  return guarded([name]() -> PyObject* {
    Py_ssize_t size;
    const char* letters = PyUnicode_AsUTF8AndSize(name, &size);  // a TypeError where it is no text
    if (letters == nullptr) return nullptr;
    auto found = signatures().find(std::string(letters, (size_t)size));
    return text(found == signatures().end() ? std::string() : found->second);
  });
}

PyMethodDef METHODS[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "cpu_capability()\n--\n\nThe instruction set that the CPU kernels use: amx, avx512, avx2 or generic."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS,
     "cpu_capabilities()\n--\n\nThe instruction sets that they could use on this processor, the fastest first."},
    {"kinds_of_arguments", kinds_of_arguments, METH_O,
     "kinds_of_arguments(name, /)\n--\n\n"
     "What an operator takes, such as \"Tensor, int\"; nothing for one that is not here."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled CPU kernels of vattn.", 0, METHODS, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace vattn

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&vattn::MODULE); }
