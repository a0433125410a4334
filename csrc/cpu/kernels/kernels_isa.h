// The kernels of one instruction set, declared for the table that holds them.
#pragma once

#include "cpu/kernels.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {

void batch_norm_stats(const BatchNormStats& op, Tile tile);
void batch_norm_act(const BatchNormAct& op, Range rows);
void batch_norm_act_reduce(const BatchNormActReduce& op, Tile tile);
void batch_norm_act_backward(const BatchNormActBackward& op, Range rows);
void masked_grad(const MaskedGrad& op, Tile tile);
void add_masked(const AddMasked& op, Range rows);
void batch_norm_act_pool(const BatchNormActPool& op, Range rows, void* scratch);
void max_pool_backward(const MaxPoolBackward& op, Range rows);

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
