// The CPU kernels for x86-64 with AVX-512: 32 registers of 16 floats.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define VATTN_ISA avx512
#define VATTN_NAME "avx512"
#define VATTN_VECTOR_BYTES 64
#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
