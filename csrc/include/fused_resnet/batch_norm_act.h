// Batch norm, optional second branch and ReLU: the passes over the activations, and the per-channel steps between them.
//
// Per-channel vectors have the accumulation dtype (float, or double for float64) and one entry a column of the
// activation's rows (channels_last) or one a channel (contiguous).  Where the comment says "bytes", s is the size of an
// element.
#pragma once

#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet {

// The part of an activation that one call of a reduction handles.  channels_last: rows and columns.  contiguous: every
// plane of the channels in `columns`; `rows` is not used.
struct Tile {
  Range rows;
  Range columns;
};

// mean and M2 = Σ(x - mean)² of every channel of a tile.  Bytes: s an element.
struct BatchNormStats {
  Activation activation;
  const void* x;
  double* mean;  // [channels]; a tile writes the channels of its columns
  double* m2;
};

// z = act(a·x + b + R), with R = 0, residual, or a_r·residual + b_r.  Bytes: 2s an element, 3s with a residual.
struct BatchNormAct {
  Activation activation;
  const void* x;
  const void* scale;
  const void* shift;
  const void* residual;        // or null
  const void* residual_scale;  // or null
  const void* residual_shift;
  void* z;
  bool relu;
  bool stream;  // store past the caches
};

// How the gradient is masked: G = grad, or 0 where not (value <= 0) fails for the value named.
enum class Mask { kNone, kPreactivation, kOutput };

struct MaskedGradient {
  const void* grad;
  Mask mask;
  const void* z;      // for kOutput
  const void* scale;  // for kPreactivation: the sign of scale·x + shift
  const void* shift;
};

// ΣG, ΣG·(x - mean), and ΣG·(residual - residual_mean) of every channel of a tile.  Bytes: 2s an element, and s for
// each of z and residual.
struct BatchNormActReduce {
  Activation activation;
  MaskedGradient gradient;
  const void* x;
  const void* mean;
  const void* residual;  // or null
  const void* residual_mean;
  double* sum_grad;  // [channels]
  double* sum_centred;
  double* sum_residual_centred;
};

// dx = a·((G − g0) − k·(x − mean)), and the same for a residual branch.  dx may be grad.  Bytes: 3s an element, s for
// each of gradient.z, masked and z, 2s for a residual.
struct BatchNormActBackward {
  Activation activation;
  MaskedGradient gradient;
  const void* x;
  const void* coefficients[4];  // a, g0, k, mean; the last three are null where the gradient is a·G alone
  void* dx;
  void* masked;          // G is written here, or null
  const void* residual;  // or null
  const void* residual_coefficients[4];
  void* residual_dx;
  void* z;      // act(a·x + b) by the gradient's scale and shift is written here, or null
  bool relu;    // whether act is that
  bool stream;  // store past the caches, but for a dx that is grad: every line written is in them
};

// G of grad, or of grad + other, written, and ΣG of what was written of every channel of a tile.  masked may be grad.
// Bytes: 3s an element, 4s with other.
struct MaskedGrad {
  Activation activation;
  const void* grad;
  const void* other;  // or null
  const void* z;
  void* masked;
  double* sum_grad;  // [channels]
  bool stream;       // store past the caches
};

// dx += G.  Bytes: 3s an element, 4s with z.
struct AddMasked {
  Activation activation;
  const void* grad;
  const void* z;  // or null: G = grad
  void* dx;
};

}  // namespace fused_resnet
