#include "plan.h"

#include <algorithm>

namespace fused_resnet::cuda {

namespace {

constexpr int64_t kVectorBytes = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int vector_width(const Matrix& matrix, std::initializer_list<const void*> pointers, ChannelPart part) {
  const int64_t widest = kVectorBytes / itemsize(matrix.dtype);
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  });
  const bool whole = matrix.channels % widest == 0 && part.first % widest == 0 && part.count % widest == 0;
  return aligned && whole ? static_cast<int>(widest) : 1;
}

Plan plan(const Matrix& matrix, int vector, Occupancy occupancy, int multiprocessors) {
  Plan plan{};
  plan.rows = matrix.rows;
  plan.channels = matrix.channels;
  plan.vector = vector;
  if (matrix.rows == 0 || matrix.channels == 0) return plan;
  const int64_t columns = matrix.channels / vector;
  plan.column_tiles = ceil_div(columns, std::min<int64_t>(kMaxTileChannels / vector, occupancy.threads));
  plan.tile_columns = static_cast<int>(ceil_div(columns, plan.column_tiles));
  plan.block_rows = occupancy.threads / plan.tile_columns;
  // as many blocks as run at a time, and a row for each
  const int64_t resident = static_cast<int64_t>(multiprocessors) * occupancy.blocks;
  const int64_t steps = ceil_div(matrix.rows, plan.block_rows);
  plan.parts = std::clamp<int64_t>(resident / plan.column_tiles, 1, steps);
  return plan;
}

Plan reduction_plan(const Matrix& matrix, int vector, int multiprocessors) {
  Plan plan = cuda::plan(matrix, vector, kReductionOccupancy, multiprocessors);
  plan.parts = std::min(plan.parts, kMaxReductionParts);
  return plan;
}

}  // namespace fused_resnet::cuda
