// Batch norm, ReLU and max pool in one pass, and the max pool's backward.
#pragma once

#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet {

// A batch of images with the channels innermost.  A contiguous activation is N * C images of one channel, of which
// image i has the coefficients i % planes; planes is 0 for channels_last.
struct PoolShape {
  DType dtype;
  int64_t images, channels, planes;
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2];
};

// z = maxpool(act(a·x + b)), index = the maximum's place in its window.  Bytes: s an input element, s + 1 an output
// element.
struct BatchNormActPool {
  PoolShape shape;
  const void* x;
  const void* scale;
  const void* shift;
  void* z;
  uint8_t* index;
  bool relu;
};

// dx = Σ grad over the windows whose maximum the element is.  Bytes: s an input element, s + 1 an output element.
struct MaxPoolBackward {
  PoolShape shape;
  const void* grad;
  const uint8_t* index;
  void* dx;
};

}  // namespace fused_resnet
