// The loops of the kernels that sum over a channel: blocks of a few rows, in either memory format.
#pragma once

#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "vector.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {

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

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
