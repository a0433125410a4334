#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fused_resnet::cpu {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kX86_64_v3:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2");
    case Isa::kX86_64_v4:
      return supported(Isa::kX86_64_v3) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kX86_64_v4_bf16:
      return supported(Isa::kX86_64_v4) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa choose() {
  const char* wanted = std::getenv("FUSED_RESNET_ISA");
  Isa best = Isa::kBaseline;
  for (Isa isa : kIsas) {
    if (!isa_built(isa) || !supported(isa)) break;
    best = isa;
    if (wanted != nullptr && std::strcmp(wanted, kIsaNames[static_cast<int>(isa)]) == 0) break;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

bool isa_built(Isa isa) {
#if defined(FUSED_RESNET_X86_64_LEVELS)
  return isa <= Isa::kX86_64_v4_bf16;
#else
  return isa == Isa::kBaseline;
#endif
}

}  // namespace fused_resnet::cpu
