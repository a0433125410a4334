// The steps between the passes: a few values a channel, always in double, on one thread.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// Merges the moments of `parts` disjoint parts of a batch (Chan et al., "Updating formulae and a pairwise algorithm for
// computing sample variances", 1979) into the mean and biased variance of the whole.  means, m2s: [parts, channels].
// Without a single element, both are NaN.
void merge_moments(const double* means, const double* m2s, const int64_t* counts, int64_t parts, int64_t channels,
                   double* mean, double* var);

// sums[c] = Σ over the parts, in their order.
void merge_sums(const double* parts_sums, int64_t parts, int64_t channels, double* sums);

// a = γ/√(var + eps) rounded to A, b = β − mean·a.  weight, bias: or null.
template <typename A>
void finish_affine(const A* mean, const A* var, const double* weight, const double* bias, double eps, int64_t channels,
                   A* scale, A* shift);

// dγ = rstd·Σ G·(x − mean), dβ = ΣG;  a, g0 = dβ/m, k = rstd·dγ/m, with m = count.
// coefficients: a, g0, k, mean [4, channels], or a alone where the statistics are not the batch's own.
template <typename A>
void finish_coefficients(const A* sum_grad, const A* sum_centred, const A* mean, const A* var, const double* weight,
                         double eps, int64_t count, bool batch_stats, int64_t channels, A* grad_weight, A* grad_bias,
                         A* coefficients);

}  // namespace fused_resnet::cpu
