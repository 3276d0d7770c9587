// Chooses the kernels of the best instruction set that this processor has, once.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vattn {

namespace generic { const Kernels& isa_kernels(); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& isa_kernels(); }
namespace avx512 { const Kernels& isa_kernels(); }
#endif

std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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
