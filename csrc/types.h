// What the operations and the kernels of every engine name alike.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Some of an activation's channels: `count` of them, from `first` on.
struct ChannelPart {
  int64_t first;
  int64_t count;
};

}  // namespace fused_resnet
