#include "kernels_isa.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    batch_norm_stats, batch_norm_act, batch_norm_act_reduce, batch_norm_act_backward,
    masked_grad,      add_masked,     batch_norm_act_pool,   max_pool_backward,
};

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
