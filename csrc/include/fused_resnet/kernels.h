// The table of CPU kernels of one instruction set.  Each kernel works on a part of its output, on the calling thread.
#pragma once

#include "fused_resnet/batch_norm_act.h"
#include "fused_resnet/batch_norm_act_pool.h"
#include "fused_resnet/isa.h"

namespace fused_resnet {

struct Kernels {
  void (*batch_norm_stats)(const BatchNormStats&, Tile);
  void (*batch_norm_act)(const BatchNormAct&, Range rows);
  void (*batch_norm_act_reduce)(const BatchNormActReduce&, Tile);
  void (*batch_norm_act_backward)(const BatchNormActBackward&, Range rows);
  void (*masked_grad)(const MaskedGrad&, Tile);
  void (*add_masked)(const AddMasked&, Range rows);
  // `rows` counts the rows of the output of all images; `scratch` holds kernel[0] * width * channels accumulators.
  void (*batch_norm_act_pool)(const BatchNormActPool&, Range rows, void* scratch);
  // `rows` counts the rows of the input of all images.
  void (*max_pool_backward)(const MaxPoolBackward&, Range rows);
};

// Those of isa().
const Kernels& kernels();

}  // namespace fused_resnet
