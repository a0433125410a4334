#include "reduction.cuh"

namespace fused_resnet::cuda {
namespace {

// A merging block has kMergeSegments threads for each of kMergeChannels channels, so that the partial results of even
// the narrowest layer are read in a few steps.
constexpr int kMergeChannels = 8;
constexpr int kMergeSegments = 32;
constexpr int kMergeThreads = kMergeChannels * kMergeSegments;
constexpr int kChannelThreads = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ double load_parameter(const Parameter& parameter, int64_t channel) {
  const int64_t i = channel * parameter.stride;
  switch (parameter.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(parameter.values)[i];
    case DType::kFloat64:
      return static_cast<const double*>(parameter.values)[i];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(parameter.values)[i]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(parameter.values)[i]);
  }
  return 0;
}

__device__ double reciprocal_std(float var, double eps) { return 1 / sqrt(static_cast<double>(var) + eps); }

// Whose channel and which of its parts a merging thread has.
struct MergePosition {
  __device__ MergePosition()
      : channel(static_cast<int64_t>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels),
        segment(threadIdx.x / kMergeChannels) {}

  int64_t channel;
  int segment;
};

// The sum of a channel's kMergeSegments values, for every thread of the channel; always in the same order.
__device__ double sum_of_segments(double value) {
  __shared__ double shared[kMergeThreads];
  __syncthreads();  // the last sum has been read
  shared[threadIdx.x] = value;
  for (int threads = kMergeThreads / 2; threads >= kMergeChannels; threads /= 2) {
    __syncthreads();
    if (threadIdx.x < threads) shared[threadIdx.x] += shared[threadIdx.x + threads];
  }
  __syncthreads();
  return shared[threadIdx.x % kMergeChannels];
}

// sum over the parts of term(part), for every thread of the channel.
template <typename Term>
__device__ double sum_of_parts(const MergePosition& position, const Plan& plan, const Term& term) {
  double sum = 0;
  if (position.channel < plan.channels) {
    for (int64_t part = position.segment; part < plan.parts; part += kMergeSegments) sum += term(part);
  }
  return sum_of_segments(sum);
}

// a = γ·rstd rounded to float; b = β − mean·a of the rounded one, so that the two errors cancel where |mean| ≫ std.
__device__ void write_affine(float mean, float var, const Parameter& weight, const Parameter& bias, double eps,
                             int64_t channel, int64_t channels, float* affine) {
  double scale = reciprocal_std(var, eps);
  if (weight.values != nullptr) scale *= load_parameter(weight, channel);
  const float rounded = static_cast<float>(scale);
  const double shift = bias.values == nullptr ? 0 : load_parameter(bias, channel);
  affine[channel] = rounded;
  affine[channels + channel] = static_cast<float>(shift - static_cast<double>(mean) * rounded);
}

// mean = Σ n_p·mean_p / m,  M2 = Σ M2_p + n_p·(mean_p − mean)²  over the parts p (Chan et al., "Updating formulae and a
// pairwise algorithm for computing sample variances", 1979).  Without a row both are NaN.
__global__ void __launch_bounds__(kMergeThreads) finish_stats_kernel(Reduction<BatchNormStats, double> reduction) {
  const Plan& plan = reduction.plan;
  const BatchNormStats& op = reduction.op;
  const MergePosition position;
  const int64_t channel = position.channel, channels = plan.channels;
  const double* means = reduction.partial + channel;
  const double* m2s = means + plan.parts * channels;
  const double count = static_cast<double>(plan.rows);
  const double mean = sum_of_parts(position, plan,
                                   [&](int64_t part) {
                                     return static_cast<double>(plan.rows_of_part(part)) * means[part * channels];
                                   }) /
                      count;
  const double var =
      sum_of_parts(position, plan,
                   [&](int64_t part) {
                     const double delta = means[part * channels] - mean;
                     return m2s[part * channels] + static_cast<double>(plan.rows_of_part(part)) * delta * delta;
                   }) /
      count;
  if (position.segment != 0 || channel >= channels) return;
  const float rounded_mean = static_cast<float>(mean), rounded_var = static_cast<float>(var);
  float* moments = floats(op.moments);
  moments[channel] = rounded_mean;
  moments[channels + channel] = rounded_var;
  moments[2 * channels + channel] = static_cast<float>(var * (count / (count > 2 ? count - 1 : 1)));
  write_affine(rounded_mean, rounded_var, op.weight, op.bias, op.eps, channel, channels, floats(op.affine));
}

// sums = Σ over the parts; ΣG is the same for both branches.
__global__ void __launch_bounds__(kMergeThreads) finish_sums_kernel(PartialSums op) {
  const MergePosition position;
  const int64_t channel = position.channel, channels = op.plan.channels;
  for (int row = 0; row < op.rows; ++row) {
    const float* partial = op.partial + row * op.plan.parts * channels + channel;
    const float sum = static_cast<float>(
        sum_of_parts(position, op.plan, [&](int64_t part) { return static_cast<double>(partial[part * channels]); }));
    if (position.segment != 0 || channel >= channels) continue;
    op.sums[(row == 2 ? 3 : row) * channels + channel] = sum;
    if (row == 0 && op.rows == 3) op.sums[2 * channels + channel] = sum;
  }
}

__global__ void __launch_bounds__(kChannelThreads) affine_kernel(BatchNormAffine op) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (channel >= op.channels) return;
  const float* moments = floats(op.moments);
  write_affine(moments[channel], moments[op.channels + channel], op.weight, op.bias, op.eps, channel, op.channels,
               floats(op.affine));
}

__global__ void __launch_bounds__(kChannelThreads) coefficients_kernel(BatchNormCoefficients op) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (channel >= op.channels) return;
  const float *sums = floats(op.sums), *moments = floats(op.moments);
  float* coefficients = floats(op.coefficients);
  const float sum_grad = sums[channel];
  const double rstd = reciprocal_std(moments[op.channels + channel], op.eps);
  const double grad_weight = rstd * sums[op.channels + channel];
  floats(op.grad_weight)[channel] = static_cast<float>(grad_weight);
  floats(op.grad_bias)[channel] = sum_grad;
  const double scale = op.weight.values == nullptr ? rstd : rstd * load_parameter(op.weight, channel);
  coefficients[channel] = static_cast<float>(scale);
  if (!op.batch_stats) return;
  const double count = static_cast<double>(op.count);
  coefficients[op.channels + channel] = static_cast<float>(sum_grad / count);
  coefficients[2 * op.channels + channel] = static_cast<float>(rstd * grad_weight / count);
  coefficients[3 * op.channels + channel] = moments[channel];
}

}  // namespace

cudaError_t finish_stats(const Launch& launch, const Reduction<BatchNormStats, double>& reduction) {
  return launch_kernel(finish_stats_kernel, ceil_div(reduction.plan.channels, kMergeChannels), kMergeThreads,
                       launch.stream, reduction);
}

cudaError_t finish_sums(const Launch& launch, const PartialSums& op) {
  return launch_kernel(finish_sums_kernel, ceil_div(op.plan.channels, kMergeChannels), kMergeThreads, launch.stream,
                       op);
}

cudaError_t batch_norm_affine(const Launch& launch, const BatchNormAffine& op) {
  return launch_kernel(affine_kernel, ceil_div(op.channels, kChannelThreads), kChannelThreads, launch.stream, op);
}

cudaError_t batch_norm_coefficients(const Launch& launch, const BatchNormCoefficients& op) {
  return launch_kernel(coefficients_kernel, ceil_div(op.channels, kChannelThreads), kChannelThreads, launch.stream, op);
}

}  // namespace fused_resnet::cuda
