#include "beside.cuh"
#include "gradient.cuh"
#include "reduction.cuh"

namespace fused_resnet::cuda {
namespace {

// Rows that a thread reads at a time.
constexpr int kReduceRows = 4;
constexpr int kReduceOfTwoRows = 2;
constexpr int kBackwardRows = 4;  // half as many of two branches, and where what is computed is more than a ReLU's

// ΣG, ΣG·(x − mean), and ΣG·(residual − residual_mean), of every channel over the rows of a part.
// Bytes: 2s an element, s for each of z and residual.
template <typename T, int kVector, Mask kMask, bool kTwo>
__global__ void __launch_bounds__(kReductionOccupancy.threads, kReductionOccupancy.blocks)
    reduce_kernel(Reduction<BatchNormActReduce, float> reduction) {
  const Plan& plan = reduction.plan;
  const BatchNormActReduce& op = reduction.op;
  constexpr int kRows = kTwo || kIsAct<kMask> ? kReduceOfTwoRows : kReduceRows;
  __shared__ float shared[kReductionOccupancy.threads * kVector];
  const Position<kVector> position(plan, Walk::kUp);
  Gradient<T, kVector, kRows, kMask> gradient(op.gradient, position, plan.channels);
  float mean[kVector], residual_mean[kVector];
  load_channels(floats(op.mean) + position.channel, mean);
  if constexpr (kTwo) load_channels(floats(op.residual_mean) + position.channel, residual_mean);

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

  const Owner owner(plan, kVector);
  float* out = reduction.partial + owner.part * plan.channels + owner.channel;
  const auto write = [&](const float (&values)[kVector]) {
    const double total = sum_of_rows(values, owner, plan.block_rows, shared);
    if (owner.writes) *out = static_cast<float>(total);
    out += plan.parts * plan.channels;
  };
  write(sum);
  write(centred);
  if constexpr (kTwo) write(residual_centred);
}

// The coefficients of a thread's channels.
template <int kVector>
struct InputGradient {
  __device__ InputGradient(const Coefficients& coefficients, int64_t channel, int64_t channels)
      : batch_stats(coefficients.batch_stats) {
    const float* row = floats(coefficients.rows) + channel;
    load_channels(row, scale);
    if (!batch_stats) return;
    load_channels(row + channels, mean_grad);
    load_channels(row + 2 * channels, slope);
    load_channels(row + 3 * channels, mean);
  }

  // dx = a·((G − g0) − k·(x − mean)), or a·G
  __device__ void operator()(const float (&g)[kVector], float (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[v] = scale[v] * (batch_stats ? fmaf(-slope[v], x[v] - mean[v], g[v] - mean_grad[v]) : g[v]);
    }
  }

  bool batch_stats;
  float scale[kVector], mean_grad[kVector], slope[kVector], mean[kVector];
};

// dx = a·((G − g0) − k·(x − mean)), or a·G; the same of a second branch, or G itself, or z = act(a·x + b), as a second
// output.  dx may be grad, as z may be x above.
// Bytes: 3s an element, s for each of gradient.z, masked and z, 2s for a residual; 1s less where x is not needed.
template <typename T, int kVector, Mask kMask, Beside kBeside>
__global__ void __launch_bounds__(kBackwardOccupancy.threads, kBackwardOccupancy.blocks)
    backward_kernel(Plan plan, BatchNormActBackward op) {
  constexpr bool kTwo = kBeside == Beside::kNormed;
  constexpr int kRows = kBackwardRows / (kTwo ? 2 : 1) / (kIsAct<kMask> ? 2 : 1);
  const Position<kVector> position(plan, Walk::kDown);
  Gradient<T, kVector, kRows, kMask> gradient(op.gradient, position, plan.channels);
  const InputGradient<kVector> input_gradient(op.coefficients, position.channel, plan.channels);
  const InputGradient<kVector> residual_gradient(kTwo ? op.residual_coefficients : op.coefficients, position.channel,
                                                 plan.channels);
  PartPosition<kVector> part(position, plan, op.masked_part);
  // where z is written there may be no ReLU; elsewhere the sign of a preactivation is that of one
  constexpr bool kMayWriteZ = kOfPreactivation<kMask> && kBeside == Beside::kWhole;
  const bool writes_z = kMayWriteZ && op.z != nullptr;
  const bool relu = !kMayWriteZ || op.gradient.act.kind != ActKind::kNone;
  const bool reads_x = kOfPreactivation<kMask> || op.coefficients.batch_stats;
  for_batches<kRows>(position, [&](const Batch<kRows>& batch) {
    Packed<T, kVector> xs[kRows] = {}, residuals[kRows];
    gradient.load(batch);
    if (reads_x) batch.load(static_cast<const T*>(op.x), xs);
    if constexpr (kTwo) batch.load(static_cast<const T*>(op.residual), residuals);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!batch.inside[i]) continue;
      const auto store = [&](void* address, const float (&values)[kVector]) {
        Packed<T, kVector>::pack(values).store(static_cast<T*>(address) + batch.offset[i]);
      };
      float x[kVector], g[kVector];
      xs[i].unpack(x);
      gradient.masked(i, x, g, relu);
      if (writes_z) {
        float z[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) z[v] = fmaf(gradient.scale[v], x[v], gradient.shift[v]);
        apply_act<!kIsAct<kMask>>(op.gradient.act, z);
        store(op.z, z);
      }
      input_gradient(g, x);
      store(op.dx, x);
      if constexpr (kTwo) {
        residuals[i].unpack(x);
        residual_gradient(g, x);
        store(op.residual_dx, x);
      } else if (kBeside == Beside::kPart) {
        if (part.has) Packed<T, kVector>::pack(g).store(static_cast<T*>(op.masked) + part.of(batch, i));
      } else if (op.masked != nullptr) {
        store(op.masked, g);
      }
    }
    if constexpr (kBeside == Beside::kPart) part.offset += kRows * part.step;
  });
}

}  // namespace

cudaError_t batch_norm_act_reduce(const Launch& launch, const Reduction<BatchNormActReduce, float>& reduction) {
  const Plan& plan = reduction.plan;
  const BatchNormActReduce& op = reduction.op;
  const cudaError_t error = visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    return visit_mask(mask_of(op.gradient), [&](auto mask) {
      return visit_bool(op.residual_mean != nullptr, [&](auto two) {
        return launch_kernel(reduce_kernel<decltype(element), vector.value, mask.value, two.value>, plan.blocks(),
                             kReductionOccupancy.threads, launch.stream, reduction);
      });
    });
  });
  const int rows = op.residual_mean == nullptr ? 2 : 3;
  return error != cudaSuccess ? error
                              : finish_sums(launch, {plan, rows, reduction.partial, static_cast<float*>(op.sums)});
}

cudaError_t batch_norm_act_backward(const Launch& launch, const BatchNormActBackward& op) {
  const Plan plan = plan_for(launch, op.image, kBackwardOccupancy,
                             {op.gradient.grad, op.gradient.z, op.gradient.affine, op.x, op.coefficients.rows, op.dx,
                              op.masked, op.residual, op.residual_coefficients.rows, op.residual_dx, op.z},
                             op.masked_part);
  return visit_elements(op.image.dtype, plan.vector, [&](auto element, auto vector) {
    return visit_mask(mask_of(op.gradient, op.z != nullptr), [&](auto mask) {
      return visit_beside(op.residual != nullptr, op.masked_part, plan.channels, [&](auto beside) {
        return launch_kernel(backward_kernel<decltype(element), vector.value, mask.value, beside.value>, plan.blocks(),
                             kBackwardOccupancy.threads, launch.stream, plan, op);
      });
    });
  });
}

}  // namespace fused_resnet::cuda
