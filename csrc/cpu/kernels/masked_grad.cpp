#include "kernels_isa.h"
#include "reduction.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

template <typename T, int kRows, bool kOther>
FUSED_RESNET_INLINE void mask_block(const MaskedGrad& op, double* sums, int64_t offset, int64_t stride,
                                    int64_t columns) {
  using A = Accumulator<T>;
  const T* grad = static_cast<const T*>(op.grad) + offset;
  const T* other = static_cast<const T*>(op.other) + (kOther ? offset : 0);
  const T* z = static_cast<const T*>(op.z) + offset;
  T* masked = static_cast<T*>(op.masked) + offset;
  for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    using V = Vector<A, decltype(lanes)::value>;
    V sum{};
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const int64_t i = row * stride + j;
      prefetch(grad + i + kRows * stride);
      if constexpr (kOther) prefetch(other + i + kRows * stride);
      prefetch(z + i + kRows * stride);
      V value = load(lanes, grad + i);
      if constexpr (kOther) value = rounded_to<T>(lanes, V(value + load(lanes, other + i)));
      value = load(lanes, z + i) <= A{} ? V{} : value;
      store(lanes, masked + i, value, op.stream);
      sum += value;
    }
    add_to(lanes, sums + j, sum);
  });
}

template <typename T, bool kOther>
void mask_columns(const MaskedGrad& op, Tile tile) {
  const int64_t columns = tile.columns.size();
  const int64_t channels = columns < op.activation.channels ? columns : op.activation.channels;
  alignas(64) double sums[kMaxColumnTile] = {};
  for_each_column_block(op.activation, tile, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    mask_block<T, rows.value, kOther>(op, sums, i, stride, count);
  });
  fold(sums, channels, columns);
  for (int64_t c = 0; c < channels; ++c) op.sum_grad[tile.columns.begin + c] = sums[c];
  fence(op.stream);
}

template <typename T, bool kOther>
void mask_planes(const MaskedGrad& op, Tile tile) {
  for (int64_t channel = tile.columns.begin; channel < tile.columns.end; ++channel) {
    alignas(64) double sums[kMaxColumnTile] = {};
    for_each_plane_block(op.activation, channel, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
      mask_block<T, rows.value, kOther>(op, sums, i, stride, count);
    });
    fold(sums, 1, kPlaneColumns);
    op.sum_grad[channel] = sums[0];
  }
  fence(op.stream);
}

template <typename T, bool kMasked>
void add_masked_rows(const AddMasked& op, Range rows) {
  using A = Accumulator<T>;
  const int64_t length = op.activation.length;
  const int64_t end = rows.end * length < op.activation.numel ? rows.end * length : op.activation.numel;
  const int64_t base = rows.begin * length;
  const T* grad = static_cast<const T*>(op.grad) + base;
  const T* z = static_cast<const T*>(op.z) + (kMasked ? base : 0);
  T* dx = static_cast<T*>(op.dx) + base;
  for_each_vector<T>(end - base, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    using V = Vector<A, decltype(lanes)::value>;
    V masked = load(lanes, grad + j);
    if constexpr (kMasked) masked = load(lanes, z + j) <= A{} ? V{} : masked;
    store(lanes, dx + j, V(load(lanes, dx + j) + masked), false);
  });
}

}  // namespace

void masked_grad(const MaskedGrad& op, Tile tile) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(op.other != nullptr, [&](auto other) {
      return op.activation.planes ? mask_planes<T, other.value>(op, tile) : mask_columns<T, other.value>(op, tile);
    });
  });
}

void add_masked(const AddMasked& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    visit_bool(op.z != nullptr, [&](auto masked) { add_masked_rows<decltype(element), masked.value>(op, rows); });
  });
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
