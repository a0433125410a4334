// How the kernels see the activations of a call, and how their work is cut for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "channel_math.h"
#include "channel_values.h"
#include "kernels.h"
#include "plan.h"

namespace fused_resnet::cpu {

// Work of fewer elements than this stays on one thread.
inline constexpr int64_t kGrainElements = 32 << 10;

// An output from this size on is stored past the caches: what reads it next would not find it there anyway, and the
// caches keep what they hold.
inline constexpr int64_t kStreamBytes = 16 << 20;
inline constexpr int64_t kStreamAlignment = 64;

// How the kernels see an operation's activations.
struct Layout {
  explicit Layout(const Image& image) {
    if (image.channels_last) plan = cpu::plan(image.pixels, image.channels, itemsize(image.dtype));
    const int64_t length = image.channels_last ? plan.row_length : image.plane;
    activation = {image.dtype, !image.channels_last, image.pixels * image.channels, length, image.channels};
  }

  // Whether an output is worth storing past the caches, and may be.
  bool streams(std::initializer_list<const void*> outputs) const {
    const int64_t size = itemsize(activation.dtype);
    if (activation.numel * size < kStreamBytes || activation.length * size % kStreamAlignment != 0) return false;
    return std::all_of(outputs.begin(), outputs.end(),
                       [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0; });
  }

  Activation activation;
  Plan plan{};  // channels_last only
};

// The rows of a [rows, C] tensor, if there is one, each repeated as often as a row of the activation has pixels.
class ChannelRows {
 public:
  ChannelRows(const void* values, int64_t rows, const Layout& layout) {
    if (values == nullptr) return;
    const int64_t channels = layout.activation.channels;
    const int64_t repeat = layout.activation.planes ? 1 : std::max<int64_t>(layout.plan.repeat, 1);
    const size_t row_bytes = static_cast<size_t>(channels * accumulator_size(layout.activation.dtype));
    pitch_ = row_bytes * static_cast<size_t>(repeat);
    rows_ = rows;
    values_ = static_cast<const char*>(values);
    if (repeat == 1) return;
    repeated_ = std::make_unique<char[]>(pitch_ * static_cast<size_t>(rows_));
    char* out = repeated_.get();
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < repeat; ++i, out += row_bytes) {
        std::memcpy(out, values_ + static_cast<size_t>(row) * row_bytes, row_bytes);
      }
    }
    values_ = repeated_.get();
  }

  // Null where there is no such row.
  const void* operator[](int64_t row) const {
    return row < rows_ ? values_ + static_cast<size_t>(row) * pitch_ : nullptr;
  }

 private:
  const char* values_ = nullptr;
  int64_t rows_ = 0;
  size_t pitch_ = 0;
  std::unique_ptr<char[]> repeated_;
};

template <typename F>
void parallel_for_rows(const Activation& activation, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, activation.length));
  torch::stable::parallel_for(0, activation.rows(), grain, [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
}

// The row tiles of a reduction, whose results have to be merged.
inline int64_t reduction_parts(const Layout& layout) { return layout.activation.planes ? 1 : layout.plan.row_tiles; }

// f(part, tile) over the tiles of a reduction.
template <typename F>
void parallel_for_tiles(const Layout& layout, const F& f) {
  const Activation& activation = layout.activation;
  if (activation.numel == 0) return;
  if (activation.planes) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (activation.numel / activation.channels));
    torch::stable::parallel_for(0, activation.channels, grain,
                                [&](int64_t begin, int64_t end) { f(0, Tile{{0, 0}, {begin, end}}); });
    return;
  }
  const Plan& plan = layout.plan;
  torch::stable::parallel_for(0, plan.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / plan.column_tiles, row = part * plan.row_tile;
      const int64_t column = i % plan.column_tiles * plan.column_tile;
      f(part, Tile{{row, std::min(row + plan.row_tile, activation.rows())},
                   {column, std::min(column + plan.column_tile, plan.row_length)}});
    }
  });
}

// `values` sums a channel, each over all tiles: f(sums, tile) writes those of a tile, [values, C].
template <typename F>
std::vector<double> sum_over_tiles(const Layout& layout, int64_t values, const F& f) {
  const int64_t size = values * layout.activation.channels, parts = reduction_parts(layout);
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(std::max<int64_t>(parts, 1) * size)]);
  parallel_for_tiles(layout, [&](int64_t part, Tile tile) { f(partial.get() + part * size, tile); });
  std::vector<double> total(static_cast<size_t>(size));
  merge_sums(partial.get(), layout.activation.numel == 0 ? 0 : parts, size, total.data());
  return total;
}

}  // namespace fused_resnet::cpu
