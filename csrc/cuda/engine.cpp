// The CUDA engine, on torch's stable ABI, as the CPU engine is.  Nothing in it waits for the GPU, and all memory is
// torch's, so that a CUDA graph can capture every operation.
#include "ops/engine.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fused_resnet {

const Engine kEngine = {
    aoti_torch_device_type_cuda(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, false};

}  // namespace fused_resnet
