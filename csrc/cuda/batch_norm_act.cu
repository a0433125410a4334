#include "activation.cuh"
#include "beside.cuh"

namespace fused_resnet::cuda {
namespace {

// Rows that a thread reads at a time.
constexpr int kActRows = 4;
constexpr int kActOfTwoRows = 2;  // two activations, or one and a part; or what is computed is more than a ReLU

// z = act(a·x + b + R), with R = 0, residual, or a_r·residual + b_r.
// z may be x: a thread reads an element before it writes it, and nobody else does either.
// Bytes: 2s an element, s for each of the residual.
template <typename T, int kVector, Beside kBeside, bool kSimple>
__global__ void __launch_bounds__(kActOccupancy.threads, kActOccupancy.blocks) act_kernel(Plan plan, BatchNormAct op) {
  constexpr bool kTwo = kBeside == Beside::kNormed;
  constexpr int kRows = kBeside == Beside::kWhole && kSimple ? kActRows : kActOfTwoRows;
  const Position<kVector> position(plan, Walk::kDown);
  PartPosition<kVector> part(position, plan, op.residual_part);
  const T* residual = static_cast<const T*>(op.residual);
  float scale[kVector], shift[kVector], residual_scale[kVector], residual_shift[kVector];
  load_channels(floats(op.affine) + position.channel, scale);
  load_channels(floats(op.affine) + plan.channels + position.channel, shift);
  if constexpr (kTwo) {
    load_channels(floats(op.residual_affine) + position.channel, residual_scale);
    load_channels(floats(op.residual_affine) + plan.channels + position.channel, residual_shift);
  }
  for_batches<kRows>(position, [&](const Batch<kRows>& batch) {
    Packed<T, kVector> xs[kRows], residuals[kRows];
    batch.load(static_cast<const T*>(op.x), xs);
    if constexpr (kBeside == Beside::kPart) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (part.has) residuals[i] = Packed<T, kVector>::load(residual + part.of(batch, i));
      }
      part.offset += kRows * part.step;
    } else if (kTwo || residual != nullptr) {
      batch.load(residual, residuals);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float z[kVector], r[kVector];
      xs[i].unpack(z);
#pragma unroll
      for (int v = 0; v < kVector; ++v) z[v] = fmaf(scale[v], z[v], shift[v]);
      if (kBeside == Beside::kPart ? part.has : kTwo || residual != nullptr) {
        residuals[i].unpack(r);
#pragma unroll
        for (int v = 0; v < kVector; ++v) z[v] += kTwo ? fmaf(residual_scale[v], r[v], residual_shift[v]) : r[v];
      }
      apply_act<kSimple>(op.act, z);
      if (batch.inside[i]) Packed<T, kVector>::pack(z).store(static_cast<T*>(op.z) + batch.offset[i]);
    }
  });
}

}  // namespace

cudaError_t batch_norm_act(const Launch& launch, const BatchNormAct& op) {
  const Plan plan = plan_for(launch, op.image, kActOccupancy, {op.x, op.affine, op.residual, op.residual_affine, op.z},
                             op.residual_part);
  return visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    return visit_beside(op.residual_affine != nullptr, op.residual_part, plan.channels, [&](auto beside) {
      return visit_bool(is_simple(op.act), [&](auto simple) {
        return launch_kernel(act_kernel<decltype(element), vector.value, beside.value, simple.value>, plan.blocks(),
                             kActOccupancy.threads, launch.stream, plan, op);
      });
    });
  });
}

}  // namespace fused_resnet::cuda
