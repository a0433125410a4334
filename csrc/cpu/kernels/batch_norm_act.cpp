#include "kernels_isa.h"
#include "vector.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

enum class Residual { kNone, kPlain, kAffine };

template <typename T, Residual kResidual, bool kBroadcast>
void forward_rows(const BatchNormAct& op, Range rows) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* z = static_cast<T*>(op.z);
  const A floor = floor_of<A>(op.relu);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * activation.length;
    const int64_t rest = activation.numel - base;
    const int64_t channel = kBroadcast ? row % activation.channels : 0;
    const Coefficient<A, kBroadcast> scale(op.scale, channel), shift(op.shift, channel);
    const Coefficient<A, kBroadcast> residual_scale(op.residual_scale, channel);
    const Coefficient<A, kBroadcast> residual_shift(op.residual_shift, channel);
    for_each_vector<T>(rest < activation.length ? rest : activation.length,
                       [&](auto lanes, int64_t j) __attribute__((always_inline)) {
                         using V = Vector<A, decltype(lanes)::value>;
                         const int64_t i = base + j;
                         V value = load(lanes, x + i) * scale(lanes, j) + shift(lanes, j);
                         if constexpr (kResidual == Residual::kPlain) value += load(lanes, residual + i);
                         if constexpr (kResidual == Residual::kAffine) {
                           value += load(lanes, residual + i) * residual_scale(lanes, j) + residual_shift(lanes, j);
                         }
                         store(lanes, z + i, at_least(floor, value), op.stream);
                       });
  }
  fence(op.stream);
}

}  // namespace

void batch_norm_act(const BatchNormAct& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(op.activation.planes, [&](auto broadcast) {
      constexpr bool kBroadcast = broadcast.value;
      if (op.residual == nullptr) return forward_rows<T, Residual::kNone, kBroadcast>(op, rows);
      if (op.residual_scale == nullptr) return forward_rows<T, Residual::kPlain, kBroadcast>(op, rows);
      return forward_rows<T, Residual::kAffine, kBroadcast>(op, rows);
    });
  });
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
