// The CPU engine, on torch's stable ABI, so that one library serves every torch from the version that it is built for.
#include "ops/arguments.h"

namespace fused_resnet {

const Engine kEngine = {
    aoti_torch_device_type_cpu(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double}, true};

}  // namespace fused_resnet
