#include "reduction.cuh"

namespace fused_resnet::cuda {
namespace {

constexpr int kStatsRows = 8;  // that a thread reads at a time

// One value a channel, from the threads of the block's first row or from the channels' owners, for every thread.
template <int kVector>
__device__ void share_channels(const float* shared, const Plan& plan, float (&values)[kVector]) {
  const float* own = shared + threadIdx.x % plan.tile_columns * kVector;
#pragma unroll
  for (int v = 0; v < kVector; ++v) values[v] = own[v];
}

// mean and M2 = Σ(x − mean)² of every channel over the rows of a part.  A thread sums d = x − s and d², with s its own
// first value, so that neither cancels where |mean| ≫ std; then the block merges its threads:
//   D = Σ n_t·D_t / n,   M2 = Σ M2_t + n_t·(D_t − D)²,   D_t = mean_t − r,  r = the first thread's s.
// Where a value is not finite, neither is a moment of the channel; s = 0 then gives the one that stock gives.
// Bytes: s an element.
template <typename T, int kVector>
__global__ void __launch_bounds__(kReductionOccupancy.threads, kReductionOccupancy.blocks)
    stats_kernel(Plan plan, const T* x, double* partial) {
  __shared__ float shared[kReductionOccupancy.threads * kVector];
  const Position<kVector> position(plan, Walk::kUp);
  float first[kVector] = {}, sum[kVector] = {}, sum_of_squares[kVector] = {};
  bool started = false;
  for_batches<kStatsRows>(position, [&](const Batch<kStatsRows>& batch) {
    Packed<T, kVector> values[kStatsRows];
    batch.load(x, values);
    if (!started) {
      values[0].unpack(first);
#pragma unroll
      for (int v = 0; v < kVector; ++v) first[v] = isfinite(first[v]) ? first[v] : 0;
      started = true;
    }
#pragma unroll
    for (int i = 0; i < kStatsRows; ++i) {
      if (!batch.inside[i]) continue;
      float value[kVector];
      values[i].unpack(value);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float d = value[v] - first[v];
        sum[v] += d;
        sum_of_squares[v] = fmaf(d, d, sum_of_squares[v]);
      }
    }
  });

  // the first row's threads always have rows
  const Owner owner(plan, kVector);
  if (threadIdx.x < plan.tile_columns) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) shared[threadIdx.x * kVector + v] = first[v];
  }
  __syncthreads();
  const float reference = owner.writes ? shared[threadIdx.x] : 0;
  float mean[kVector], weighted[kVector];
  share_channels(shared, plan, mean);
  const float count = static_cast<float>(position.count);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    mean[v] = count == 0 ? 0 : first[v] - mean[v] + sum[v] / count;
    weighted[v] = count * mean[v];
  }
  const double rows = static_cast<double>(plan.rows_of_part(owner.part));
  const double part_mean = sum_of_rows(weighted, owner, plan.block_rows, shared) / rows;

  // in the place of what the thread alone has read
  if (threadIdx.x < owner.width) shared[threadIdx.x] = static_cast<float>(part_mean);
  __syncthreads();
  float m2[kVector];
  share_channels(shared, plan, m2);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const float delta = mean[v] - m2[v];
    m2[v] = count == 0 ? 0 : sum_of_squares[v] - sum[v] * (sum[v] / count) + count * delta * delta;
  }
  const double part_m2 = sum_of_rows(m2, owner, plan.block_rows, shared);
  if (!owner.writes) return;
  double* out = partial + owner.part * plan.channels + owner.channel;
  out[0] = reference + part_mean;
  out[plan.parts * plan.channels] = part_m2;
}

}  // namespace

cudaError_t batch_norm_stats(const Launch& launch, const Reduction<BatchNormStats, double>& reduction) {
  const Plan& plan = reduction.plan;
  const BatchNormStats& op = reduction.op;
  const cudaError_t error = visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    using T = decltype(element);
    return launch_kernel(stats_kernel<T, vector.value>, plan.blocks(), kReductionOccupancy.threads, launch.stream, plan,
                         static_cast<const T*>(op.x), reduction.partial);
  });
  return error != cudaSuccess ? error : finish_stats(launch, reduction);
}

}  // namespace fused_resnet::cuda
