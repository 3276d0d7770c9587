// The CPU kernels for any processor.
#include "kernels.h"

#include <torch/headeronly/util/Half.h>

#include <initializer_list>

#define VATTN_ISA generic
#define VATTN_NAME "generic"
#define VATTN_VECTOR_BYTES 16
#include "isa_kernels.h"
