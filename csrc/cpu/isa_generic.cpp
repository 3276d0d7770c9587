// The CPU kernels for any processor.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <initializer_list>

#define VATTN_ISA generic
#define VATTN_NAME "generic"
#define VATTN_VECTOR_BYTES 16
#include "isa_kernels.h"
