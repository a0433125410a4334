#include "activation.h"
#include "kernels_isa.h"
#include "reduction.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

// G of a vector of elements i that stand in the columns j, where the input is x: for what a sign decides.
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

// G of a chunk of elements, for every other activation.
template <typename T, bool kBroadcast>
class ChunkGradient {
  using A = Accumulator<T>;

 public:
  ChunkGradient(const MaskedGradient& gradient, const T* x, int64_t channel)
      : gradient_(gradient), x_(x), scale_(gradient.scale, channel), shift_(gradient.shift, channel) {}

  // grad and v = z, or a·x + b, of `count` elements from i on, which stand in the columns from j on.
  FUSED_RESNET_INLINE void read(int64_t i, int64_t j, int64_t count, A* grad, A* v) const {
    const T* source = static_cast<const T*>(gradient_.grad) + i;
    const T* z = static_cast<const T*>(gradient_.z);
    for_each_vector<T>(count, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      store(lanes, grad + k, load(lanes, source + k));
      if (z != nullptr) {
        store(lanes, v + k, load(lanes, z + i + k));
      } else {
        using V = Vector<A, decltype(lanes)::value>;
        store(lanes, v + k, V(load(lanes, x_ + i + k) * scale_(lanes, j + k) + shift_(lanes, j + k)));
      }
    });
  }

 private:
  const MaskedGradient& gradient_;
  const T* x_;
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
    case Mask::kActivation:
      return visitor(Constant<Mask::kActivation>{});
  }
}

// ---- the sums

struct GradientSums {
  alignas(64) double grad[kMaxColumnTile] = {};
  alignas(64) double centred[kMaxColumnTile] = {};
  alignas(64) double residual_centred[kMaxColumnTile] = {};
};

// A block of G, where it is made before it is added up: rows of so many columns.
constexpr int64_t kChunkColumns = kChunkElements / kBlockRows;
template <typename T, Mask kMask>
struct GradientChunks {
  static constexpr int64_t kElements = kMask == Mask::kActivation ? kChunkElements : 1;
  Chunk<Accumulator<T>, kElements> grad, v;
};

template <typename T, Mask kMask, bool kResidual, bool kBroadcast>
class Reduction {
  using A = Accumulator<T>;

 public:
  Reduction(const BatchNormActReduce& op, int64_t channel)
      : x_(static_cast<const T*>(op.x)),
        residual_(static_cast<const T*>(op.residual)),
        gradient_(op.gradient),
        masked_(op.gradient, channel),
        chunk_(op.gradient, x_, channel),
        mean_(op.mean, channel),
        residual_mean_(op.residual_mean, channel) {}

  template <int kRows>
  FUSED_RESNET_INLINE void add(GradientSums& sums, GradientChunks<T, kMask>& chunks, int64_t offset, int64_t stride,
                               int64_t columns) const {
    if constexpr (kMask != Mask::kActivation) return add_columns<kRows>(sums, chunks, offset, stride, 0, columns);
    for (int64_t first = 0; first < columns; first += kChunkColumns) {
      const int64_t count = columns - first < kChunkColumns ? columns - first : kChunkColumns;
      const int64_t pitch = whole_vectors<A>(count);
      for (int row = 0; row < kRows; ++row) {
        chunk_.read(offset + row * stride + first, first, count, chunks.grad.values + row * pitch,
                    chunks.v.values + row * pitch);
      }
      multiply_by_gradient(gradient_.act, chunks.grad.values, chunks.v.values, kRows * pitch);
      add_columns<kRows>(sums, chunks, offset, stride, first, count);
    }
  }

 private:
  // Those of `count` columns from the first on; the chunk holds their G where it was made before.
  template <int kRows>
  FUSED_RESNET_INLINE void add_columns(GradientSums& sums, const GradientChunks<T, kMask>& chunks, int64_t offset,
                                       int64_t stride, int64_t first, int64_t count) const {
    const int64_t pitch = whole_vectors<A>(count);
    for_each_vector<T>(count, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      using V = Vector<A, decltype(lanes)::value>;
      const int64_t j = first + k;
      const V mean = mean_(lanes, j);
      V sum{}, centred{}, residual_centred{};
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const int64_t i = offset + row * stride + j;
        prefetch(x_ + i + kRows * stride);
        masked_.prefetch_at(i + kRows * stride);
        if constexpr (kResidual) prefetch(residual_ + i + kRows * stride);
        const V x = load(lanes, x_ + i);
        V grad;
        if constexpr (kMask == Mask::kActivation) {
          grad = load(lanes, chunks.grad.values + row * pitch + k);
        } else {
          grad = masked_(lanes, i, j, x);
        }
        sum += grad;
        centred += grad * (x - mean);
        if constexpr (kResidual) residual_centred += grad * (load(lanes, residual_ + i) - residual_mean_(lanes, j));
      }
      add_to(lanes, sums.grad + j, sum);
      add_to(lanes, sums.centred + j, centred);
      if constexpr (kResidual) add_to(lanes, sums.residual_centred + j, residual_centred);
    });
  }

  const T* x_;
  const T* residual_;
  const MaskedGradient& gradient_;
  GradientMask<T, kMask, kBroadcast> masked_;
  ChunkGradient<T, kBroadcast> chunk_;
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
  GradientChunks<T, kMask> chunks;
  for_each_column_block(activation, tile, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
    reduction.template add<rows.value>(sums, chunks, i, stride, count);
  });
  finish_sums<kResidual>(op, sums, channels, columns, tile.columns.begin);
}

template <typename T, Mask kMask, bool kResidual>
void reduce_planes(const BatchNormActReduce& op, Tile tile) {
  GradientChunks<T, kMask> chunks;
  for (int64_t channel = tile.columns.begin; channel < tile.columns.end; ++channel) {
    const Reduction<T, kMask, kResidual, true> reduction(op, channel);
    GradientSums sums;
    for_each_plane_block(op.activation, channel, [&](auto rows, int64_t i, int64_t stride, int64_t count) {
      reduction.template add<rows.value>(sums, chunks, i, stride, count);
    });
    finish_sums<kResidual>(op, sums, 1, kPlaneColumns, channel);
  }
}

// ---- the gradients

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
  const A floor = floor_of<A>(op.gradient.act);
  constexpr bool kChunks = kMask == Mask::kActivation;
  Chunk<A, kChunks ? kChunkElements : 1> grads, values;
  const bool stream = op.stream, stream_dx = stream && op.dx != op.gradient.grad;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t base = row * activation.length;
    const int64_t rest = activation.numel - base, columns = rest < activation.length ? rest : activation.length;
    const int64_t channel = kBroadcast ? row % activation.channels : 0;
    const GradientMask<T, kMask, kBroadcast> masked(op.gradient, channel);
    const InputGradient<A, kBroadcast> first(op.coefficients, channel), second(op.residual_coefficients, channel);
    // of a vector in the columns j, whose input, G and activation these are
    const auto write = [&](auto lanes, int64_t j, auto input, auto grad, auto activated)
                           __attribute__((always_inline)) {
                             const int64_t i = base + j;
                             if (written != nullptr) store(lanes, written + i, grad, stream);
                             if (z != nullptr) store(lanes, z + i, activated(), stream);
                             store(lanes, dx + i, first(lanes, j, grad, input), stream_dx);
                             if constexpr (kResidual) {
                               const Vector<A, decltype(lanes)::value> other = load(lanes, residual + i);
                               store(lanes, residual_dx + i, second(lanes, j, grad, other), stream);
                             }
                           };
    if constexpr (!kChunks) {
      for_each_vector<T>(columns, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        const auto input = load(lanes, x + base + j);
        write(lanes, j, input, masked(lanes, base + j, j, input),
              [&]() __attribute__((always_inline)) { return at_least(floor, masked.preactivation(lanes, j, input)); });
      });
    } else {
      const ChunkGradient<T, kBroadcast> chunk(op.gradient, x, channel);
      for_each_chunk(columns, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
        chunk.read(base + begin, begin, count, grads.values, values.values);
        multiply_by_gradient(op.gradient.act, grads.values, values.values, count);
        if (z != nullptr) activate(op.gradient.act, values.values, count);
        for_each_vector<T>(count, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
          write(lanes, begin + k, load(lanes, x + base + begin + k), load(lanes, grads.values + k),
                [&]() __attribute__((always_inline)) { return load(lanes, values.values + k); });
        });
      });
    }
  }
  fence(stream);
}

}  // namespace

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

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
