// How a channels_last activation is cut into tiles.  The cut depends on the shape alone, never on the number of
// threads, so that every sum is made in the same order on every machine.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// The most columns that a tile of a reduction has: its accumulators (three rows of doubles) stay in the L1 cache.
inline constexpr int64_t kMaxColumnTile = 512;

struct Plan {
  int64_t repeat;      // pixels side by side in one row, see Activation
  int64_t row_length;  // repeat * channels
  int64_t row_tile;    // rows in a tile of a reduction
  int64_t row_tiles;
  int64_t column_tile;  // columns in a tile of a reduction; less than row_length only where repeat is 1
  int64_t column_tiles;

  int64_t tiles() const { return row_tiles * column_tiles; }
};

// pixels: N * H * W.  itemsize: bytes of an element.
Plan plan(int64_t pixels, int64_t channels, int64_t itemsize);

}  // namespace fused_resnet::cpu
