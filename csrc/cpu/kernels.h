// The CPU kernels: the passes over activations.  Each works on a part of its output, on the calling thread.
//
// Per-channel vectors have the accumulation dtype (float, or double for float64) and one entry a column of the
// activation's rows (channels_last) or one a channel (contiguous).  Where the comment says "bytes", s is the size of an
// element.
#pragma once

#include <cstdint>

#include "isa.h"
#include "ops/engine.h"

namespace fused_resnet::cpu {

// Half-open, as everywhere.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// A dense activation as rows of one length, so that one loop serves both memory formats:
//
//   channels_last   a row is `length = repeat * channels` columns: whole pixels side by side, and column j belongs to
//                   channel j % channels.  Short pixels (16 channels) are put side by side so that the inner loop is
//                   long and ends on a whole vector; per-channel vectors come repeated as often.  The last row may be
//                   cut short.
//   contiguous      a row is one plane of `length = height * width` elements of channel row % channels.
struct Activation {
  DType dtype;
  bool planes;  // contiguous
  int64_t numel;
  int64_t length;
  int64_t channels;

  int64_t rows() const { return length ? (numel + length - 1) / length : 0; }

  // channels_last: how many pixels the rows hold, with the last one perhaps cut short.
  int64_t pixels(Range rows) const {
    const int64_t end = rows.end * length;
    return ((end < numel ? end : numel) - rows.begin * length) / channels;
  }
};

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
  Act act;
  bool stream;  // store past the caches
};

// How the gradient is masked: G = grad, or for a ReLU 0 where the value named is <= 0, or grad·act'(v) for any other
// activation, with v = z or, where that is null, scale·x + shift.
enum class Mask { kNone, kPreactivation, kOutput, kActivation };

struct MaskedGradient {
  const void* grad;
  Mask mask;
  const void* z;      // for kOutput and kActivation
  const void* scale;  // for kPreactivation and kActivation: scale·x + shift
  const void* shift;
  Act act;
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

// ---- max pool

// A batch of images with the channels innermost.  A contiguous activation is N * C images of one channel, of which
// image i has the coefficients i % planes; planes is 0 for channels_last.
struct PoolShape {
  DType dtype;
  int64_t images, channels, planes;
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2];
};

// z = maxpool(act(a·x + b)), index = the maximum's place in its window.  Bytes: s an input element, s + 1 an output
// element.
struct BatchNormActPool {
  PoolShape shape;
  const void* x;
  const void* scale;
  const void* shift;
  void* z;
  uint8_t* index;
  Act act;
};

// dx = Σ grad over the windows whose maximum the element is.  Bytes: s an input element, s + 1 an output element.
struct MaxPoolBackward {
  PoolShape shape;
  const void* grad;
  const uint8_t* index;
  void* dx;
};

// ---- the table of one instruction set

struct Kernels {
  void (*batch_norm_stats)(const BatchNormStats&, Tile);
  void (*batch_norm_act)(const BatchNormAct&, Range rows);
  void (*batch_norm_act_reduce)(const BatchNormActReduce&, Tile);
  void (*batch_norm_act_backward)(const BatchNormActBackward&, Range rows);
  void (*masked_grad)(const MaskedGrad&, Tile);
  void (*add_masked)(const AddMasked&, Range rows);
  // `rows` counts the rows of the output of all images; `scratch` holds kernel[0] * width * channels accumulators.
  void (*batch_norm_act_pool)(const BatchNormActPool&, Range rows, void* scratch);
  // `rows` counts the rows of the input of all images.
  void (*max_pool_backward)(const MaxPoolBackward&, Range rows);
};

// Those of isa().
const Kernels& kernels();

}  // namespace fused_resnet::cpu
