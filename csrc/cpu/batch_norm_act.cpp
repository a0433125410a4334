#include "fused_resnet/batch_norm_act.h"

#include "fused_resnet/plan.h"
#include "kernels_isa.h"
#include "vector.h"

namespace fused_resnet {
namespace FUSED_RESNET_ISA {

namespace {

// A reduction adds this many rows in registers before it touches its accumulators.  That also bounds what float
// accumulation can lose: everything beyond these rows is summed in double.
constexpr int kBlockRows = 8;

// A plane is reduced as rows of this many columns that all belong to one channel.
constexpr int64_t kPlaneColumns = 64;

// body(Constant<rows in this block>, first row) until all rows are done.
template <typename Body>
FUSED_RESNET_INLINE void for_each_block(Range rows, const Body& body) {
  int64_t row = rows.begin;
  for (; row + kBlockRows <= rows.end; row += kBlockRows) body(Constant<kBlockRows>{}, row);
  for (; row < rows.end; ++row) body(Constant<1>{}, row);
}

// body(Constant<rows>, offset of the first element, stride of the rows, columns) over the blocks of a tile of a
// channels_last activation.
template <typename Body>
FUSED_RESNET_INLINE void for_each_column_block(const Activation& activation, Tile tile, const Body& body) {
  const int64_t stride = activation.length;
  const int64_t whole = activation.numel / stride < tile.rows.end ? activation.numel / stride : tile.rows.end;
  for_each_block({tile.rows.begin, whole}, [&](auto rows, int64_t row) __attribute__((always_inline)) {
    body(rows, row * stride + tile.columns.begin, stride, tile.columns.size());
  });
  // the last row where it is cut short: such a row is many pixels, hence one tile wide
  if (whole < tile.rows.end) body(Constant<1>{}, whole * stride, stride, activation.numel - whole * stride);
}

// The same over all planes of one channel of a contiguous activation.
template <typename Body>
FUSED_RESNET_INLINE void for_each_plane_block(const Activation& activation, int64_t channel, const Body& body) {
  const int64_t whole = activation.length / kPlaneColumns;
  const int64_t rest = activation.length % kPlaneColumns;
  for (int64_t plane = channel; plane < activation.rows(); plane += activation.channels) {
    const int64_t base = plane * activation.length;
    for_each_block({0, whole}, [&](auto rows, int64_t row) __attribute__((always_inline)) {
      body(rows, base + row * kPlaneColumns, kPlaneColumns, kPlaneColumns);
    });
    if (rest != 0) body(Constant<1>{}, base + whole * kPlaneColumns, kPlaneColumns, rest);
  }
}

// Adds the columns of each channel up into the first `channels` columns.
template <typename A>
void fold(A* values, int64_t channels, int64_t columns) {
  for (int64_t base = channels; base < columns; base += channels) {
    for (int64_t c = 0; c < channels; ++c) values[c] += values[base + c];
  }
}

// G of a vector of elements i that stand in the columns j, where the input is x.
template <typename T, Mask kMask, bool kBroadcast>
class GradientMask {
  using A = Accumulator<T>;

 public:
  GradientMask(const MaskedGradient& gradient, int64_t channel)
      : grad_(static_cast<const T*>(gradient.grad)),
        z_(static_cast<const T*>(gradient.z)),
        scale_(gradient.scale, channel),
        shift_(gradient.shift, channel) {}

  template <int N>
  FUSED_RESNET_INLINE Vector<A, N> operator()(Lanes<N> lanes, int64_t i, int64_t j, Vector<A, N> x) const {
    Vector<A, N> grad = load(lanes, grad_ + i);
    if constexpr (kMask == Mask::kOutput) grad = load(lanes, z_ + i) <= A{} ? Vector<A, N>{} : grad;
    if constexpr (kMask == Mask::kPreactivation) {
      grad = preactivation(lanes, j, x) <= A{} ? Vector<A, N>{} : grad;
    }
    return grad;
  }

  template <int N>
  FUSED_RESNET_INLINE Vector<A, N> preactivation(Lanes<N> lanes, int64_t j, Vector<A, N> x) const {
    return x * scale_(lanes, j) + shift_(lanes, j);
  }

  // Asks for the elements from i on, early enough for a block to find them.
  FUSED_RESNET_INLINE void prefetch_at(int64_t i) const {
    prefetch(grad_ + i);
    if constexpr (kMask == Mask::kOutput) prefetch(z_ + i);
  }

 private:
  const T* grad_;
  const T* z_;
  Coefficient<A, kBroadcast> scale_, shift_;
};

template <typename Visitor>
void visit_mask(Mask mask, const Visitor& visitor) {
  switch (mask) {
    case Mask::kNone:
      return visitor(Constant<Mask::kNone>{});
    case Mask::kPreactivation:
      return visitor(Constant<Mask::kPreactivation>{});
    case Mask::kOutput:
      return visitor(Constant<Mask::kOutput>{});
  }
}

// ---- statistics

// Σ(x − shift) and Σ(x − shift)² of every column, with a shift near the mean, so that the difference of large numbers
// Σx² − (Σx)²/m never arises: M2 = Σ(x − shift)² − (Σ(x − shift))²/m.
struct ShiftedSums {
  alignas(64) double sum[kMaxColumnTile] = {};
  alignas(64) double squares[kMaxColumnTile] = {};
};

template <typename T, int kRows, bool kBroadcast>
FUSED_RESNET_INLINE void add_shifted(ShiftedSums& sums, const T* x, int64_t stride, int64_t columns,
                                     const Coefficient<Accumulator<T>, kBroadcast>& shift) {
  for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    using V = Vector<Accumulator<T>, decltype(lanes)::value>;
    const V origin = shift(lanes, j);
    // Σx of float is made in double, as in stock torch: a mean that is next to 0 has no other digits
    constexpr bool kExact = sizeof(T) == sizeof(float);
    alignas(64) double exact[decltype(lanes)::value] = {};
    V sum{}, squares{};
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      prefetch(x + (row + kRows) * stride + j);
      const V value = load(lanes, x + row * stride + j);
      const V centred = value - origin;
      kExact ? add_from(lanes, exact, x + row * stride + j) : (void)(sum += centred);
      squares += centred * centred;
    }
    if constexpr (kExact) {
      for (int i = 0; i < decltype(lanes)::value; ++i)
        sums.sum[j + i] += exact[i] - kRows * static_cast<double>(origin[i]);
    } else {
      add_to(lanes, sums.sum + j, sum);
    }
    add_to(lanes, sums.squares + j, squares);
  });
}

// A shift must be finite: then an infinite element gives an infinite mean and a NaN variance, as in stock torch.
template <typename A>
A finite_or_zero(A shift) {
  return shift - shift == 0 ? shift : A{};
}

void finish_moments(const ShiftedSums& sums, double shift, int64_t c, double count, double* mean, double* m2) {
  const double offset = sums.sum[c] / count;
  const double spread = sums.squares[c] - sums.sum[c] * offset;
  *mean = shift + offset;
  *m2 = spread < 0 ? 0 : spread;  // NaN stays
}

template <typename T>
void stats_columns(const BatchNormStats& op, Tile tile) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const int64_t columns = tile.columns.size();
  const int64_t channels = columns < activation.channels ? columns : activation.channels;

  // the shift of a channel: its mean over the first few pixels
  const int64_t lead_rows = tile.rows.size() < kBlockRows ? tile.rows.size() : kBlockRows;
  const Tile lead = {{tile.rows.begin, tile.rows.begin + lead_rows}, tile.columns};
  alignas(64) A shift[kMaxColumnTile] = {};
  for_each_column_block(activation, lead, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    for_each_vector<T>(count, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      auto sum = load(lanes, shift + j);
      for (int row = 0; row < rows.value; ++row) sum += load(lanes, x + i + row * stride + j);
      store(lanes, shift + j, sum);
    });
  });
  const double lead_pixels = static_cast<double>(activation.pixels(lead.rows));
  fold(shift, channels, columns);
  for (int64_t c = 0; c < channels; ++c) shift[c] = finite_or_zero(static_cast<A>(shift[c] / lead_pixels));
  for (int64_t j = channels; j < columns; ++j) shift[j] = shift[j - channels];

  ShiftedSums sums;
  const Coefficient<A, false> origin(shift, 0);
  for_each_column_block(activation, tile, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    add_shifted<T, rows.value>(sums, x + i, stride, count, origin);
  });
  const double pixels = static_cast<double>(activation.pixels(tile.rows));
  fold(sums.sum, channels, columns);
  fold(sums.squares, channels, columns);
  double* mean = op.mean + tile.columns.begin;
  double* m2 = op.m2 + tile.columns.begin;
  for (int64_t c = 0; c < channels; ++c) finish_moments(sums, shift[c], c, pixels, mean + c, m2 + c);
}

template <typename T>
void stats_planes(const BatchNormStats& op, Tile tile) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const int64_t lead = activation.length < kPlaneColumns ? activation.length : kPlaneColumns;
  for (int64_t channel = tile.columns.begin; channel < tile.columns.end; ++channel) {
    double total = 0;
    for (int64_t i = 0; i < lead; ++i) total += load(Lanes<1>{}, x + channel * activation.length + i)[0];
    const A shift = finite_or_zero(static_cast<A>(total / static_cast<double>(lead)));
    ShiftedSums sums;
    const Coefficient<A, true> origin(&shift, 0);
    for_each_plane_block(activation, channel, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
      add_shifted<T, rows.value>(sums, x + i, stride, count, origin);
    });
    fold(sums.sum, 1, kPlaneColumns);
    fold(sums.squares, 1, kPlaneColumns);
    finish_moments(sums, shift, 0, static_cast<double>(activation.numel / activation.channels), op.mean + channel,
                   op.m2 + channel);
  }
}

// ---- forward

enum class Residual { kNone, kPlain, kAffine };

template <typename T, Residual kResidual, bool kBroadcast>
void forward_rows(const BatchNormAct& op, Range rows) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* z = static_cast<T*>(op.z);
  const A floor = floor_of<A>(op.relu);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * activation.length;
    const int64_t rest = activation.numel - base;
    const int64_t channel = kBroadcast ? row % activation.channels : 0;
    const Coefficient<A, kBroadcast> scale(op.scale, channel), shift(op.shift, channel);
    const Coefficient<A, kBroadcast> residual_scale(op.residual_scale, channel);
    const Coefficient<A, kBroadcast> residual_shift(op.residual_shift, channel);
    for_each_vector<T>(rest < activation.length ? rest : activation.length,
                       [&](auto lanes, int64_t j) __attribute__((always_inline)) {
                         using V = Vector<A, decltype(lanes)::value>;
                         const int64_t i = base + j;
                         V value = load(lanes, x + i) * scale(lanes, j) + shift(lanes, j);
                         if constexpr (kResidual == Residual::kPlain) value += load(lanes, residual + i);
                         if constexpr (kResidual == Residual::kAffine) {
                           value += load(lanes, residual + i) * residual_scale(lanes, j) + residual_shift(lanes, j);
                         }
                         store(lanes, z + i, at_least(floor, value), op.stream);
                       });
  }
  fence(op.stream);
}

// ---- backward

struct GradientSums {
  alignas(64) double grad[kMaxColumnTile] = {};
  alignas(64) double centred[kMaxColumnTile] = {};
  alignas(64) double residual_centred[kMaxColumnTile] = {};
};

template <typename T, Mask kMask, bool kResidual, bool kBroadcast>
class Reduction {
  using A = Accumulator<T>;

 public:
  Reduction(const BatchNormActReduce& op, int64_t channel)
      : x_(static_cast<const T*>(op.x)),
        residual_(static_cast<const T*>(op.residual)),
        masked_(op.gradient, channel),
        mean_(op.mean, channel),
        residual_mean_(op.residual_mean, channel) {}

  template <int kRows>
  FUSED_RESNET_INLINE void add(GradientSums& sums, int64_t offset, int64_t stride, int64_t columns) const {
    for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      using V = Vector<A, decltype(lanes)::value>;
      const V mean = mean_(lanes, j);
      V sum{}, centred{}, residual_centred{};
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const int64_t i = offset + row * stride + j;
        prefetch(x_ + i + kRows * stride);
        masked_.prefetch_at(i + kRows * stride);
        if constexpr (kResidual) prefetch(residual_ + i + kRows * stride);
        const V x = load(lanes, x_ + i);
        const V grad = masked_(lanes, i, j, x);
        sum += grad;
        centred += grad * (x - mean);
        if constexpr (kResidual) residual_centred += grad * (load(lanes, residual_ + i) - residual_mean_(lanes, j));
      }
      add_to(lanes, sums.grad + j, sum);
      add_to(lanes, sums.centred + j, centred);
      if constexpr (kResidual) add_to(lanes, sums.residual_centred + j, residual_centred);
    });
  }

 private:
  const T* x_;
  const T* residual_;
  GradientMask<T, kMask, kBroadcast> masked_;
  Coefficient<A, kBroadcast> mean_, residual_mean_;
};

// Writes the sums of `channels` channels, the first of which is `channel`.
template <bool kResidual>
void finish_sums(const BatchNormActReduce& op, GradientSums& sums, int64_t channels, int64_t columns, int64_t channel) {
  const auto write = [&](double* values, double* out) {
    fold(values, channels, columns);
    for (int64_t c = 0; c < channels; ++c) out[channel + c] = values[c];
  };
  write(sums.grad, op.sum_grad);
  write(sums.centred, op.sum_centred);
  if constexpr (kResidual) write(sums.residual_centred, op.sum_residual_centred);
}

template <typename T, Mask kMask, bool kResidual>
void reduce_columns(const BatchNormActReduce& op, Tile tile) {
  const Activation& activation = op.activation;
  const int64_t columns = tile.columns.size();
  const int64_t channels = columns < activation.channels ? columns : activation.channels;
  const Reduction<T, kMask, kResidual, false> reduction(op, tile.columns.begin);
  GradientSums sums;
  for_each_column_block(activation, tile, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    reduction.template add<rows.value>(sums, i, stride, count);
  });
  finish_sums<kResidual>(op, sums, channels, columns, tile.columns.begin);
}

template <typename T, Mask kMask, bool kResidual>
void reduce_planes(const BatchNormActReduce& op, Tile tile) {
  for (int64_t channel = tile.columns.begin; channel < tile.columns.end; ++channel) {
    const Reduction<T, kMask, kResidual, true> reduction(op, channel);
    GradientSums sums;
    for_each_plane_block(op.activation, channel, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
      reduction.template add<rows.value>(sums, i, stride, count);
    });
    finish_sums<kResidual>(op, sums, 1, kPlaneColumns, channel);
  }
}

// a·((G − g0) − k·(x − mean)), or a·G where the statistics were not the batch's own.  The differences come first, so
// that what cancels in them has not been rounded yet.
template <typename A, bool kBroadcast>
class InputGradient {
 public:
  InputGradient(const void* const (&coefficients)[4], int64_t channel)
      : batch_stats_(coefficients[1] != nullptr),
        a_(coefficients[0], channel),
        g0_(coefficients[1], channel),
        k_(coefficients[2], channel),
        mean_(coefficients[3], channel) {}

  template <int N>
  FUSED_RESNET_INLINE Vector<A, N> operator()(Lanes<N> lanes, int64_t j, Vector<A, N> grad, Vector<A, N> x) const {
    if (batch_stats_) grad = (grad - g0_(lanes, j)) - k_(lanes, j) * (x - mean_(lanes, j));
    return a_(lanes, j) * grad;
  }

 private:
  bool batch_stats_;
  Coefficient<A, kBroadcast> a_, g0_, k_, mean_;
};

template <typename T, Mask kMask, bool kResidual, bool kBroadcast>
void backward_rows(const BatchNormActBackward& op, Range rows) {
  using A = Accumulator<T>;
  const Activation& activation = op.activation;
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* dx = static_cast<T*>(op.dx);
  T* residual_dx = static_cast<T*>(op.residual_dx);
  T* written = static_cast<T*>(op.masked);
  T* z = static_cast<T*>(op.z);
  const A floor = floor_of<A>(op.relu);
  const bool stream = op.stream, stream_dx = stream && op.dx != op.gradient.grad;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * activation.length;
    const int64_t rest = activation.numel - base;
    const int64_t channel = kBroadcast ? row % activation.channels : 0;
    const GradientMask<T, kMask, kBroadcast> masked(op.gradient, channel);
    const InputGradient<A, kBroadcast> first(op.coefficients, channel), second(op.residual_coefficients, channel);
    for_each_vector<T>(rest < activation.length ? rest : activation.length,
                       [&](auto lanes, int64_t j) __attribute__((always_inline)) {
                         using V = Vector<A, decltype(lanes)::value>;
                         const int64_t i = base + j;
                         const V input = load(lanes, x + i);
                         const V grad = masked(lanes, i, j, input);
                         if (written != nullptr) store(lanes, written + i, grad, stream);
                         if (z != nullptr) {
                           store(lanes, z + i, at_least(floor, masked.preactivation(lanes, j, input)), stream);
                         }
                         store(lanes, dx + i, first(lanes, j, grad, input), stream_dx);
                         if constexpr (kResidual) {
                           const V other = load(lanes, residual + i);
                           store(lanes, residual_dx + i, second(lanes, j, grad, other), stream);
                         }
                       });
  }
  fence(stream);
}

template <typename T, int kRows, bool kOther>
FUSED_RESNET_INLINE void mask_block(const MaskedGrad& op, double* sums, int64_t offset, int64_t stride,
                                    int64_t columns) {
  using A = Accumulator<T>;
  const T* grad = static_cast<const T*>(op.grad) + offset;
  const T* other = static_cast<const T*>(op.other) + (kOther ? offset : 0);
  const T* z = static_cast<const T*>(op.z) + offset;
  T* masked = static_cast<T*>(op.masked) + offset;
  for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    using V = Vector<A, decltype(lanes)::value>;
    V sum{};
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const int64_t i = row * stride + j;
      prefetch(grad + i + kRows * stride);
      if constexpr (kOther) prefetch(other + i + kRows * stride);
      prefetch(z + i + kRows * stride);
      V value = load(lanes, grad + i);
      if constexpr (kOther) value = rounded_to<T>(lanes, V(value + load(lanes, other + i)));
      value = load(lanes, z + i) <= A{} ? V{} : value;
      store(lanes, masked + i, value, op.stream);
      sum += value;
    }
    add_to(lanes, sums + j, sum);
  });
}

template <typename T, bool kOther>
void mask_columns(const MaskedGrad& op, Tile tile) {
  const int64_t columns = tile.columns.size();
  const int64_t channels = columns < op.activation.channels ? columns : op.activation.channels;
  alignas(64) double sums[kMaxColumnTile] = {};
  for_each_column_block(op.activation, tile, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    mask_block<T, rows.value, kOther>(op, sums, i, stride, count);
  });
  fold(sums, channels, columns);
  for (int64_t c = 0; c < channels; ++c) op.sum_grad[tile.columns.begin + c] = sums[c];
  fence(op.stream);
}

template <typename T, bool kOther>
void mask_planes(const MaskedGrad& op, Tile tile) {
  for (int64_t channel = tile.columns.begin; channel < tile.columns.end; ++channel) {
    alignas(64) double sums[kMaxColumnTile] = {};
    for_each_plane_block(op.activation, channel, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
      mask_block<T, rows.value, kOther>(op, sums, i, stride, count);
    });
    fold(sums, 1, kPlaneColumns);
    op.sum_grad[channel] = sums[0];
  }
  fence(op.stream);
}

template <typename T, bool kMasked>
void add_masked_rows(const AddMasked& op, Range rows) {
  using A = Accumulator<T>;
  const int64_t length = op.activation.length;
  const int64_t end = rows.end * length < op.activation.numel ? rows.end * length : op.activation.numel;
  const int64_t base = rows.begin * length;
  const T* grad = static_cast<const T*>(op.grad) + base;
  const T* z = static_cast<const T*>(op.z) + (kMasked ? base : 0);
  T* dx = static_cast<T*>(op.dx) + base;
  for_each_vector<T>(end - base, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    using V = Vector<A, decltype(lanes)::value>;
    V masked = load(lanes, grad + j);
    if constexpr (kMasked) masked = load(lanes, z + j) <= A{} ? V{} : masked;
    store(lanes, dx + j, V(load(lanes, dx + j) + masked), false);
  });
}

}  // namespace

// ---- entry points: run-time choices become template arguments ------------------------------------------------------

void batch_norm_stats(const BatchNormStats& op, Tile tile) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    return op.activation.planes ? stats_planes<T>(op, tile) : stats_columns<T>(op, tile);
  });
}

void batch_norm_act(const BatchNormAct& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(op.activation.planes, [&](auto broadcast) {
      constexpr bool kBroadcast = broadcast.value;
      if (op.residual == nullptr) return forward_rows<T, Residual::kNone, kBroadcast>(op, rows);
      if (op.residual_scale == nullptr) return forward_rows<T, Residual::kPlain, kBroadcast>(op, rows);
      return forward_rows<T, Residual::kAffine, kBroadcast>(op, rows);
    });
  });
}

void batch_norm_act_reduce(const BatchNormActReduce& op, Tile tile) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_mask(op.gradient.mask, [&](auto mask) {
      visit_bool(op.residual != nullptr, [&](auto residual) {
        return op.activation.planes ? reduce_planes<T, mask.value, residual.value>(op, tile)
                                    : reduce_columns<T, mask.value, residual.value>(op, tile);
      });
    });
  });
}

void batch_norm_act_backward(const BatchNormActBackward& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_mask(op.gradient.mask, [&](auto mask) {
      visit_bool(op.residual != nullptr, [&](auto residual) {
        visit_bool(op.activation.planes, [&](auto broadcast) {
          return backward_rows<T, mask.value, residual.value, broadcast.value>(op, rows);
        });
      });
    });
  });
}

void masked_grad(const MaskedGrad& op, Tile tile) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(op.other != nullptr, [&](auto other) {
      return op.activation.planes ? mask_planes<T, other.value>(op, tile) : mask_columns<T, other.value>(op, tile);
    });
  });
}

void add_masked(const AddMasked& op, Range rows) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    visit_bool(op.z != nullptr, [&](auto masked) { add_masked_rows<decltype(element), masked.value>(op, rows); });
  });
}

}  // namespace FUSED_RESNET_ISA
}  // namespace fused_resnet
