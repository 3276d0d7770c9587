// Chooses the kernels of the best instruction set that this processor has, once.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vattn {

namespace generic { const Kernels& isa_kernels(); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& isa_kernels(); }
namespace avx512 { const Kernels& isa_kernels(); }
namespace amx { const Kernels& isa_kernels(); }
#endif

std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

#if defined(__x86_64__)
// Whether this processor has matrix tiles of bfloat16 that the system lets the process use. Once given, that permission
// is all threads'.
static bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && has_amx()) available.push_back(&amx::isa_kernels());
  if (has_avx512) available.push_back(&avx512::isa_kernels());
  if (has_avx2) available.push_back(&avx2::isa_kernels());
#endif
  available.push_back(&generic::isa_kernels());
  return available;
}

static const Kernels& choose() {
  const char* wish = std::getenv("VATTN_CPU_CAPABILITY");
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (wish == nullptr || *wish == '\0' || std::string(wish) == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error("vattn: VATTN_CPU_CAPABILITY must be one of " + names +
                           " on this processor, got VATTN_CPU_CAPABILITY=" + wish);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vattn
