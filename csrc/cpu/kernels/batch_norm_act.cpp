#include "activation.h"
#include "kernels_isa.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

enum class Residual { kNone, kPlain, kAffine };

template <typename T, Residual kResidual, bool kBroadcast, bool kFloor>
void forward_rows(const BatchNormAct& op, Range rows) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* z = static_cast<T*>(op.z);
  const A floor = floor_of<A>(op.act);
  Chunk<A, kFloor ? 1 : kChunkElements> chunk;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * activation.length;
    const int64_t rest = activation.numel - base, columns = rest < activation.length ? rest : activation.length;
    const int64_t channel = kBroadcast ? row % activation.channels : 0;
    const Coefficient<A, kBroadcast> scale(op.scale, channel), shift(op.shift, channel);
    const Coefficient<A, kBroadcast> residual_scale(op.residual_scale, channel);
    const Coefficient<A, kBroadcast> residual_shift(op.residual_shift, channel);
    const auto sum = [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      const int64_t i = base + j;
      Vector<A, decltype(lanes)::value> value = load(lanes, x + i) * scale(lanes, j) + shift(lanes, j);
      if constexpr (kResidual == Residual::kPlain) value += load(lanes, residual + i);
      if constexpr (kResidual == Residual::kAffine) {
        value += load(lanes, residual + i) * residual_scale(lanes, j) + residual_shift(lanes, j);
      }
      return value;
    };
    if constexpr (kFloor) {
      for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        store(lanes, z + base + j, at_least(floor, sum(lanes, j)), op.stream);
      });
    } else {
      for_each_chunk(columns, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for_each_vector<T>(count, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
          store(lanes, chunk.values + j, sum(lanes, first + j));
        });
        activate(op.act, chunk.values, count);
        for_each_vector<T>(count, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
          store(lanes, z + base + first + j, load(lanes, chunk.values + j), op.stream);
        });
      });
    }
  }
  fence(op.stream);
}

}  // namespace

void batch_norm_act(const BatchNormAct& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(op.activation.planes, [&](auto broadcast) {
      constexpr bool kBroadcast = broadcast.value;
      visit_bool(is_floor(op.act), [&](auto floor) {
        if (op.residual == nullptr) return forward_rows<T, Residual::kNone, kBroadcast, floor.value>(op, rows);
        if (op.residual_scale == nullptr) return forward_rows<T, Residual::kPlain, kBroadcast, floor.value>(op, rows);
        return forward_rows<T, Residual::kAffine, kBroadcast, floor.value>(op, rows);
      });
    });
  });
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
