#include "kernels_isa.h"
#include "reduction.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

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

}  // namespace

void batch_norm_stats(const BatchNormStats& op, Tile tile) {
  visit_dtype(op.activation.dtype, [&](auto element) {
    using T = decltype(element);
    return op.activation.planes ? stats_planes<T>(op, tile) : stats_columns<T>(op, tile);
  });
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
