#include "vector.cuh"

namespace fused_resnet::cuda {
namespace {

constexpr bool kReverse = false;

// Rows that a thread reads at a time.
constexpr int kActRows = 4;
constexpr int kActOfTwoRows = 2;  // two activations, or one and a part
constexpr int kBackwardRows = 4;
constexpr int kBackwardOfTwoRows = 2;
constexpr int kAddMaskedRows = 2;

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

// act.  NaN passes, as in stock torch.
template <int kVector>
__device__ void apply_act(bool relu, float (&z)[kVector]) {
  if (!relu) return;
#pragma unroll
  for (int v = 0; v < kVector; ++v) z[v] = z[v] <= 0 ? 0 : z[v];
}

// z = act(a·x + b + R), with R = 0, residual, or a_r·residual + b_r.
// z may be x: a thread reads an element before it writes it, and nobody else does either.
// Bytes: 2s an element, s for each of the residual.
template <typename T, int kVector, Beside kBeside>
__global__ void __launch_bounds__(kActOccupancy.threads, kActOccupancy.blocks) act_kernel(Plan plan, BatchNormAct op) {
  constexpr bool kTwo = kBeside == Beside::kNormed;
  constexpr int kRows = kBeside == Beside::kWhole ? kActRows : kActOfTwoRows;
  const Position<kVector> position(plan, kReverse);
  PartPosition<kVector> part(position, plan, op.residual_part);
  const T* residual = static_cast<const T*>(op.residual);
  float scale[kVector], shift[kVector], residual_scale[kVector], residual_shift[kVector];
  load_channels(op.affine + position.channel, scale);
  load_channels(op.affine + plan.channels + position.channel, shift);
  if constexpr (kTwo) {
    load_channels(op.residual_affine + position.channel, residual_scale);
    load_channels(op.residual_affine + plan.channels + position.channel, residual_shift);
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
      apply_act(op.relu, z);
      if (batch.inside[i]) Packed<T, kVector>::pack(z).store(static_cast<T*>(op.z) + batch.offset[i]);
    }
  });
}

// The coefficients of a thread's channels.
template <int kVector>
struct InputGradient {
  __device__ InputGradient(const Coefficients& coefficients, int64_t channel, int64_t channels)
      : batch_stats(coefficients.batch_stats) {
    const float* row = coefficients.rows + channel;
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
template <typename T, int kVector, Sign kSign, Beside kBeside>
__global__ void __launch_bounds__(kBackwardOccupancy.threads, kBackwardOccupancy.blocks)
    backward_kernel(Plan plan, BatchNormActBackward op) {
  constexpr bool kTwo = kBeside == Beside::kNormed;
  constexpr int kRows = kTwo ? kBackwardOfTwoRows : kBackwardRows;
  const Position<kVector> position(plan, kReverse);
  Gradient<T, kVector, kRows, kSign> gradient(op.gradient, position, plan.channels);
  const InputGradient<kVector> input_gradient(op.coefficients, position.channel, plan.channels);
  const InputGradient<kVector> residual_gradient(kTwo ? op.residual_coefficients : op.coefficients, position.channel,
                                                 plan.channels);
  PartPosition<kVector> part(position, plan, op.masked_part);
  // where z is written there may be no ReLU; elsewhere the sign of a preactivation is that of one
  constexpr bool kMayWriteZ = kSign == Sign::kOfPreactivation && kBeside == Beside::kWhole;
  const bool writes_z = kMayWriteZ && op.z != nullptr, relu = !kMayWriteZ || op.gradient.relu;
  const bool reads_x = kSign == Sign::kOfPreactivation || op.coefficients.batch_stats;
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
        apply_act(relu, z);
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

// dx += G, with G = grad, or 0 where z <= 0.  Bytes: 3s an element, 4s with z.
template <typename T, int kVector>
__global__ void __launch_bounds__(kAddMaskedOccupancy.threads, kAddMaskedOccupancy.blocks)
    add_masked_kernel(Plan plan, AddMasked op) {
  const Position<kVector> position(plan, kReverse);
  const MaskedGradient masked = {op.grad, op.z, nullptr, true};
  Gradient<T, kVector, kAddMaskedRows, Sign::kOfOutput> gradient(masked, position, plan.channels);
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

Plan plan_for(const Launch& launch, const Matrix& matrix, Occupancy occupancy,
              std::initializer_list<const void*> pointers, ChannelPart part = {0, 0}) {
  return plan(matrix, vector_width(matrix, pointers, part), occupancy, launch.multiprocessors);
}

template <typename Visitor>
cudaError_t visit_beside(bool normed, ChannelPart part, int64_t channels, const Visitor& visitor) {
  if (normed) return visitor(Constant<Beside::kNormed>{});
  const bool whole = part.count == 0 || part.count == channels;
  return whole ? visitor(Constant<Beside::kWhole>{}) : visitor(Constant<Beside::kPart>{});
}

}  // namespace

cudaError_t batch_norm_act(const Launch& launch, const BatchNormAct& op) {
  const Plan plan = plan_for(launch, op.matrix, kActOccupancy, {op.x, op.affine, op.residual, op.residual_affine, op.z},
                             op.residual_part);
  return visit_elements(op.matrix.dtype, plan.vector, [&](auto element, auto vector) {
    return visit_beside(op.residual_affine != nullptr, op.residual_part, plan.channels, [&](auto beside) {
      return launch_kernel(act_kernel<decltype(element), vector.value, beside.value>, plan.blocks(),
                           kActOccupancy.threads, launch.stream, plan, op);
    });
  });
}

cudaError_t batch_norm_act_backward(const Launch& launch, const BatchNormActBackward& op) {
  const Plan plan = plan_for(launch, op.matrix, kBackwardOccupancy,
                             {op.gradient.grad, op.gradient.z, op.gradient.affine, op.x, op.coefficients.rows, op.dx,
                              op.masked, op.residual, op.residual_coefficients.rows, op.residual_dx, op.z},
                             op.masked_part);
  return visit_elements(op.matrix.dtype, plan.vector, [&](auto element, auto vector) {
    // what computes the activation has its sign
    return visit_sign(op.z != nullptr ? Sign::kOfPreactivation : sign_of(op.gradient), [&](auto sign) {
      return visit_beside(op.residual != nullptr, op.masked_part, plan.channels, [&](auto beside) {
        return launch_kernel(backward_kernel<decltype(element), vector.value, sign.value, beside.value>, plan.blocks(),
                             kBackwardOccupancy.threads, launch.stream, plan, op);
      });
    });
  });
}

cudaError_t add_masked(const Launch& launch, const AddMasked& op) {
  const Plan plan = plan_for(launch, op.matrix, kAddMaskedOccupancy, {op.grad, op.z, op.dx});
  return visit_elements(op.matrix.dtype, plan.vector, [&](auto element, auto vector) {
    return launch_kernel(add_masked_kernel<decltype(element), vector.value>, plan.blocks(), kAddMaskedOccupancy.threads,
                         launch.stream, plan, op);
  });
}

}  // namespace fused_resnet::cuda
