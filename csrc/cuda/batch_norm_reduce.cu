#include "batch_norm_channels.cuh"
#include "vector.cuh"

namespace fused_resnet::cuda {
namespace {

// Reductions walk from the last row to the first: what was written last is what the second-level cache still holds. The
// pass that applies their result walks the other way, for the same reason.
constexpr bool kReverse = true;

// Rows that a thread reads at a time.
constexpr int kStatsRows = 8;
constexpr int kReduceRows = 4;
constexpr int kReduceOfTwoRows = 2;
constexpr int kMaskedGradRows = 4;

// The channel of a tile whose sums a thread ends up with, and where it goes; every thread of the block calls.
struct Owner {
  __device__ Owner(const Plan& plan, int vector) : width(plan.tile_columns * vector) {
    channel = blockIdx.x % plan.column_tiles * width + threadIdx.x;
    part = blockIdx.x / plan.column_tiles;
    writes = threadIdx.x < width && channel < plan.channels;
  }

  int width;  // channels of a tile
  int64_t channel, part;
  bool writes;
};

// The sums over a block's rows of the values that every thread has for its channels; thread c < owner.width gets that
// of channel c of the tile.  In double: the sum may be far smaller than its terms.
template <int kVector>
__device__ double sum_of_rows(const float (&values)[kVector], const Owner& owner, int block_rows, float* shared) {
  __syncthreads();  // what is there has been read
#pragma unroll
  for (int v = 0; v < kVector; ++v) shared[threadIdx.x * kVector + v] = values[v];
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < owner.width) {
#pragma unroll 8
    for (int row = 0; row < block_rows; ++row) sum += shared[row * owner.width + threadIdx.x];
  }
  return sum;
}

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
  const Position<kVector> position(plan, kReverse);
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

// ΣG, ΣG·(x − mean), and ΣG·(residual − residual_mean), of every channel over the rows of a part.
// Bytes: 2s an element, s for each of z and residual.
template <typename T, int kVector, Sign kSign, bool kTwo>
__global__ void __launch_bounds__(kReductionOccupancy.threads, kReductionOccupancy.blocks)
    reduce_kernel(BatchNormActReduce op) {
  constexpr int kRows = kTwo ? kReduceOfTwoRows : kReduceRows;
  __shared__ float shared[kReductionOccupancy.threads * kVector];
  const Position<kVector> position(op.plan, kReverse);
  Gradient<T, kVector, kRows, kSign> gradient(op.gradient, position, op.plan.channels);
  float mean[kVector], residual_mean[kVector];
  load_channels(op.mean + position.channel, mean);
  if constexpr (kTwo) load_channels(op.residual_mean + position.channel, residual_mean);

  float sum[kVector] = {}, centred[kVector] = {}, residual_centred[kVector] = {};
  for_batches<kRows>(position, [&](const Batch<kRows>& batch) {
    Packed<T, kVector> xs[kRows], residuals[kRows];
    gradient.load(batch);
    batch.load(static_cast<const T*>(op.x), xs);
    if constexpr (kTwo) batch.load(static_cast<const T*>(op.residual), residuals);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!batch.inside[i]) continue;
      float x[kVector], g[kVector];
      xs[i].unpack(x);
      gradient.masked(i, x, g);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        sum[v] += g[v];
        centred[v] = fmaf(g[v], x[v] - mean[v], centred[v]);
      }
      if constexpr (kTwo) {
        residuals[i].unpack(x);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          residual_centred[v] = fmaf(g[v], x[v] - residual_mean[v], residual_centred[v]);
        }
      }
    }
  });

  const Owner owner(op.plan, kVector);
  float* out = op.partial + owner.part * op.plan.channels + owner.channel;
  const auto write = [&](const float (&values)[kVector]) {
    const double total = sum_of_rows(values, owner, op.plan.block_rows, shared);
    if (owner.writes) *out = static_cast<float>(total);
    out += op.plan.parts * op.plan.channels;
  };
  write(sum);
  write(centred);
  if constexpr (kTwo) write(residual_centred);
}

// masked = G of grad, or of grad + other, and ΣG of every channel over the rows of a part.
// masked may be grad: a thread reads an element before it writes it, and nobody else does either.
// Bytes: 3s an element, 4s with other.
template <typename T, int kVector>
__global__ void __launch_bounds__(kReductionOccupancy.threads, kReductionOccupancy.blocks)
    masked_grad_kernel(MaskedGrad op) {
  __shared__ float shared[kReductionOccupancy.threads * kVector];
  const Position<kVector> position(op.plan, kReverse);
  const MaskedGradient masked = {op.grad, op.z, nullptr, true};
  Gradient<T, kVector, kMaskedGradRows, Sign::kOfOutput> gradient(masked, position, op.plan.channels);
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

  const Owner owner(op.plan, kVector);
  const double total = sum_of_rows(sum, owner, op.plan.block_rows, shared);
  if (owner.writes) op.partial[owner.part * op.plan.channels + owner.channel] = static_cast<float>(total);
}

}  // namespace

cudaError_t batch_norm_stats(const Launch& launch, const BatchNormStats& op) {
  const cudaError_t error = visit_elements(op.dtype, op.plan.vector, [&](auto element, auto vector) {
    using T = decltype(element);
    return launch_kernel(stats_kernel<T, vector.value>, op.plan.blocks(), kReductionOccupancy.threads, launch.stream,
                         op.plan, static_cast<const T*>(op.x), op.partial);
  });
  return error != cudaSuccess ? error : finish_stats(launch, op);
}

cudaError_t batch_norm_act_reduce(const Launch& launch, const BatchNormActReduce& op) {
  const cudaError_t error = visit_elements(op.dtype, op.plan.vector, [&](auto element, auto vector) {
    return visit_sign(sign_of(op.gradient), [&](auto sign) {
      return visit_bool(op.residual_mean != nullptr, [&](auto two) {
        return launch_kernel(reduce_kernel<decltype(element), vector.value, sign.value, two.value>, op.plan.blocks(),
                             kReductionOccupancy.threads, launch.stream, op);
      });
    });
  });
  const int rows = op.residual_mean == nullptr ? 2 : 3;
  return error != cudaSuccess ? error : finish_sums(launch, {op.plan, rows, op.partial, op.sums});
}

cudaError_t masked_grad(const Launch& launch, const MaskedGrad& op) {
  const cudaError_t error = visit_elements(op.dtype, op.plan.vector, [&](auto element, auto vector) {
    return launch_kernel(masked_grad_kernel<decltype(element), vector.value>, op.plan.blocks(),
                         kReductionOccupancy.threads, launch.stream, op);
  });
  return error != cudaSuccess ? error : finish_sums(launch, {op.plan, 1, op.partial, op.sums});
}

}  // namespace fused_resnet::cuda
