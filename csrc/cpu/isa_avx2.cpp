// The CPU kernels for x86-64 with AVX2, FMA and F16C: 16 registers of 8 floats.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif

#define VATTN_ISA avx2
#define VATTN_NAME "avx2"
#define VATTN_VECTOR_BYTES 32
#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
