#include "plan.h"

#include <algorithm>

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kMinRowLength = 256;           // the inner loop is worth its start from here
constexpr int64_t kWholeVectors = 16;            // lanes of the widest vector
constexpr int64_t kMinTileElements = 128 << 10;  // a tile's partial sums cost little beside its elements
constexpr int64_t kMaxRowTiles = 64;             // and so does merging them

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least number of pixels that makes a row long enough and whole in vectors.
int64_t pixels_per_row(int64_t channels) {
  const int64_t least = std::max<int64_t>(1, ceil_div(kMinRowLength, channels));
  for (int64_t repeat = least; repeat * channels <= kMaxColumnTile; ++repeat) {
    if (repeat * channels % kWholeVectors == 0) return repeat;
  }
  return least;
}

}  // namespace

Plan plan(int64_t pixels, int64_t channels, int64_t itemsize) {
  Plan plan{};
  if (pixels == 0 || channels == 0) return plan;
  plan.repeat = pixels_per_row(channels);
  plan.row_length = plan.repeat * channels;
  const int64_t columns = itemsize == 8 ? kMaxColumnTile / 2 : kMaxColumnTile;
  plan.column_tile = plan.repeat == 1 ? std::min(channels, columns) : plan.row_length;
  plan.column_tiles = ceil_div(plan.row_length, plan.column_tile);
  const int64_t rows = ceil_div(pixels, plan.repeat);
  plan.row_tile = std::max(ceil_div(rows, kMaxRowTiles), ceil_div(kMinTileElements, plan.column_tile));
  plan.row_tiles = ceil_div(rows, plan.row_tile);
  return plan;
}

}  // namespace fused_resnet::cpu
