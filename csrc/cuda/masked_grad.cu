#include "gradient.cuh"
#include "reduction.cuh"

namespace fused_resnet::cuda {
namespace {

// Rows that a thread reads at a time.
constexpr int kMaskedGradRows = 4;
constexpr int kAddMaskedRows = 2;

// masked = G of grad, or of grad + other, and ΣG of every channel over the rows of a part.
// masked may be grad: a thread reads an element before it writes it, and nobody else does either.
// Bytes: 3s an element, 4s with other.
template <typename T, int kVector>
__global__ void __launch_bounds__(kReductionOccupancy.threads, kReductionOccupancy.blocks)
    masked_grad_kernel(Reduction<MaskedGrad, float> reduction) {
  const Plan& plan = reduction.plan;
  const MaskedGrad& op = reduction.op;
  __shared__ float shared[kReductionOccupancy.threads * kVector];
  const Position<kVector> position(plan, Walk::kUp);
  const MaskedGradient masked = {op.grad, op.z, nullptr, {ActKind::kRelu}};
  Gradient<T, kVector, kMaskedGradRows, Mask::kOutput> gradient(masked, position, plan.channels);
  float sum[kVector] = {};
  for_batches<kMaskedGradRows>(position, [&](const Batch<kMaskedGradRows>& batch) {
    Packed<T, kVector> others[kMaskedGradRows];
    gradient.load(batch);
    if (op.other != nullptr) batch.load(static_cast<const T*>(op.other), others);
#pragma unroll
    for (int i = 0; i < kMaskedGradRows; ++i) {
      if (!batch.inside[i]) continue;
      // rounded, since what is stored is added up
      if (op.other != nullptr) gradient.grads[i] = gradient.grads[i].plus(others[i]);
      float g[kVector];
      gradient.masked(i, {}, g);
      Packed<T, kVector>::pack(g).store(static_cast<T*>(op.masked) + batch.offset[i]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += g[v];
    }
  });

  const Owner owner(plan, kVector);
  const double total = sum_of_rows(sum, owner, plan.block_rows, shared);
  if (owner.writes) reduction.partial[owner.part * plan.channels + owner.channel] = static_cast<float>(total);
}

// dx += G, with G = grad, or 0 where z <= 0.  Bytes: 3s an element, 4s with z.
template <typename T, int kVector>
__global__ void __launch_bounds__(kAddMaskedOccupancy.threads, kAddMaskedOccupancy.blocks)
    add_masked_kernel(Plan plan, AddMasked op) {
  const Position<kVector> position(plan, Walk::kDown);
  const MaskedGradient masked = {op.grad, op.z, nullptr, {ActKind::kRelu}};
  Gradient<T, kVector, kAddMaskedRows, Mask::kOutput> gradient(masked, position, plan.channels);
  T* dx = static_cast<T*>(op.dx);
  for_batches<kAddMaskedRows>(position, [&](const Batch<kAddMaskedRows>& batch) {
    Packed<T, kVector> sums[kAddMaskedRows];
    gradient.load(batch);
    batch.load(dx, sums);
#pragma unroll
    for (int i = 0; i < kAddMaskedRows; ++i) {
      if (!batch.inside[i]) continue;
      float sum[kVector], g[kVector];
      sums[i].unpack(sum);
      gradient.masked(i, sum, g);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += g[v];
      Packed<T, kVector>::pack(sum).store(dx + batch.offset[i]);
    }
  });
}

}  // namespace

cudaError_t masked_grad(const Launch& launch, const Reduction<MaskedGrad, float>& reduction) {
  const Plan& plan = reduction.plan;
  const MaskedGrad& op = reduction.op;
  const cudaError_t error = visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    return launch_kernel(masked_grad_kernel<decltype(element), vector.value>, plan.blocks(),
                         kReductionOccupancy.threads, launch.stream, reduction);
  });
  return error != cudaSuccess ? error : finish_sums(launch, {plan, 1, reduction.partial, static_cast<float*>(op.sums)});
}

cudaError_t add_masked(const Launch& launch, const AddMasked& op) {
  const Plan plan = plan_for(launch, op.image, kAddMaskedOccupancy, {op.grad, op.z, op.dx});
  return visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    return launch_kernel(add_masked_kernel<decltype(element), vector.value>, plan.blocks(), kAddMaskedOccupancy.threads,
                         launch.stream, plan, op);
  });
}

}  // namespace fused_resnet::cuda
