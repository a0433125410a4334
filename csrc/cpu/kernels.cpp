#include "kernels.h"

namespace fused_resnet::cpu {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(FUSED_RESNET_X86_64_LEVELS)
namespace x86_64_v3 {
extern const Kernels kKernels;
}
namespace x86_64_v4 {
extern const Kernels kKernels;
}
namespace x86_64_v4_bf16 {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels() {
#if defined(FUSED_RESNET_X86_64_LEVELS)
  switch (isa()) {
    case Isa::kX86_64_v4_bf16:
      return x86_64_v4_bf16::kKernels;
    case Isa::kX86_64_v4:
      return x86_64_v4::kKernels;
    case Isa::kX86_64_v3:
      return x86_64_v3::kKernels;
    case Isa::kBaseline:
      break;
  }
#endif
  return baseline::kKernels;
}

}  // namespace fused_resnet::cpu
