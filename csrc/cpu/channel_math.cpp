#include "channel_math.h"

#include <cmath>
#include <limits>

namespace fused_resnet::cpu {

void merge_moments(const double* means, const double* m2s, const int64_t* counts, int64_t parts, int64_t channels,
                   double* mean, double* var) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = var[c] = 0;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const double count = static_cast<double>(counts[part]);
    const double weight = count / (total + count);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = means[part * channels + c] - mean[c];
      var[c] += m2s[part * channels + c] + delta * delta * total * weight;
      // not mean + delta·weight: where one mean is infinite, so is the result, and not NaN
      mean[c] = mean[c] * (1 - weight) + means[part * channels + c] * weight;
    }
    total += count;
  }
  for (int64_t c = 0; c < channels; ++c) {
    var[c] /= total;
    if (total == 0) mean[c] = std::numeric_limits<double>::quiet_NaN();
  }
}

void merge_sums(const double* parts_sums, int64_t parts, int64_t channels, double* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += parts_sums[part * channels + c];
  }
}

template <typename A>
void finish_affine(const A* mean, const A* var, const double* weight, const double* bias, double eps, int64_t channels,
                   A* scale, A* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
    scale[c] = static_cast<A>(weight == nullptr ? rstd : rstd * weight[c]);
    // made from the rounded scale, so that the two errors cancel where |mean| ≫ std
    shift[c] = static_cast<A>((bias == nullptr ? 0 : bias[c]) - static_cast<double>(mean[c]) * scale[c]);
  }
}

template <typename A>
void finish_coefficients(const A* sum_grad, const A* sum_centred, const A* mean, const A* var, const double* weight,
                         double eps, int64_t count, bool batch_stats, int64_t channels, A* grad_weight, A* grad_bias,
                         A* coefficients) {
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
    const double scale = weight == nullptr ? rstd : rstd * weight[c];
    const double centred = rstd * sum_centred[c];
    grad_weight[c] = static_cast<A>(centred);
    grad_bias[c] = sum_grad[c];
    coefficients[c] = static_cast<A>(scale);
    if (!batch_stats) continue;
    coefficients[channels + c] = static_cast<A>(sum_grad[c] / static_cast<double>(count));
    coefficients[2 * channels + c] = static_cast<A>(rstd * centred / static_cast<double>(count));
    coefficients[3 * channels + c] = mean[c];
  }
}

template void finish_affine(const float*, const float*, const double*, const double*, double, int64_t, float*, float*);
template void finish_affine(const double*, const double*, const double*, const double*, double, int64_t, double*,
                            double*);
template void finish_coefficients(const float*, const float*, const float*, const float*, const double*, double,
                                  int64_t, bool, int64_t, float*, float*, float*);
template void finish_coefficients(const double*, const double*, const double*, const double*, const double*, double,
                                  int64_t, bool, int64_t, double*, double*, double*);

}  // namespace fused_resnet::cpu
