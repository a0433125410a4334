// A second activation beside the first, which may have a part of the channels.
#pragma once

#include "vector.cuh"

namespace fused_resnet::cuda {

// What a second activation beside the first is: none or a whole one, one with a part of the channels, or one with a
// batch norm of its own.
enum class Beside { kWhole, kPart, kNormed };

// Where the rows of a thread are in a tensor that has a part of the channels.
template <int kVector>
struct PartPosition {
  __device__ PartPosition(const Position<kVector>& position, const Plan& plan, ChannelPart part)
      : has(position.channel >= part.first && position.channel < part.first + part.count),
        offset(position.begin / plan.channels * part.count + position.channel - part.first),
        step(position.step / plan.channels * part.count) {}

  // The offset of a row of the batch, as Batch has it.
  template <int kRows>
  __device__ int64_t of(const Batch<kRows>& batch, int i) const {
    return batch.inside[i] ? offset + i * step : offset;
  }

  bool has;              // whether the thread's channels are in the part
  int64_t offset, step;  // of the batch's first row, and from row to row
};

template <typename Visitor>
cudaError_t visit_beside(bool normed, ChannelPart part, int64_t channels, const Visitor& visitor) {
  if (normed) return visitor(Constant<Beside::kNormed>{});
  const bool whole = part.count == 0 || part.count == channels;
  return whole ? visitor(Constant<Beside::kWhole>{}) : visitor(Constant<Beside::kPart>{});
}

}  // namespace fused_resnet::cuda
