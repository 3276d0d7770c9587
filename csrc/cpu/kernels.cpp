// Chooses the kernels of the best instruction set that this processor has, once.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vattn {

namespace generic { const Kernels& table(); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& table(); }
namespace avx512 { const Kernels& table(); }
#endif

static const Kernels& choose() {
  const char* wish = std::getenv("VATTN_CPU_CAPABILITY");
  auto wanted = [&](const char* name) { return wish == nullptr || *wish == '\0' || std::string(wish) == name; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted("avx512")) return avx512::table();
  if (has_avx2 && wanted("avx2")) return avx2::table();
#endif
  if (wanted("generic")) return generic::table();
  throw std::runtime_error("VATTN_CPU_CAPABILITY must name an instruction set of this processor (avx512, avx2 or "
                           "generic), got VATTN_CPU_CAPABILITY=" + std::string(wish));
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vattn
