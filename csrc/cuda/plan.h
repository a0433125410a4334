// How the CUDA kernels cut a channels_last activation into blocks.  Plain C++: what a launch looks like can be asked,
// and tested, without a GPU.
//
// The activation is a row-major matrix [rows, channels], rows = N * H * W.  A thread owns `vector` channels side by
// side and walks down the rows, so that it reads its per-channel values once and computes no index per element.  A
// block of block_rows x tile_columns threads covers as many rows at a time and a tile of the channels; `parts` blocks
// take the rows of a tile in turn, one step of block_rows each, so that together they move through memory as one front.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "ops/engine.h"

#ifdef __CUDACC__
#define FUSED_RESNET_HOST_DEVICE __host__ __device__
#else
#define FUSED_RESNET_HOST_DEVICE
#endif

namespace fused_resnet::cuda {

// The shape of an activation.
struct Matrix {
  DType dtype;
  int64_t rows;
  int64_t channels;
};

inline Matrix matrix_of(const Image& image) { return {image.dtype, image.pixels, image.channels}; }

// Threads of a block, and blocks that a multiprocessor holds at a time: what a kernel's registers are bounded for, and
// what its grid is made of.
struct Occupancy {
  int threads;
  int blocks;
};

// A thread keeps per-channel values, sums and many loads in registers: few threads with much under way.  A reduction's
// are one block a multiprocessor, so that there are few partial sums.
inline constexpr Occupancy kReductionOccupancy = {512, 1};
inline constexpr Occupancy kActOccupancy = {256, 3};
inline constexpr Occupancy kBackwardOccupancy = {256, 2};
inline constexpr Occupancy kAddMaskedOccupancy = {256, 4};

// The most parts that a reduction's rows are cut into, so that merging them costs little beside the pass itself.
inline constexpr int64_t kMaxReductionParts = 264;

// The most channels of a block: 512 bytes of a row of halves, four whole lines of the cache.
inline constexpr int64_t kMaxTileChannels = 256;

struct Plan {
  int64_t rows;
  int64_t channels;
  int vector;            // channels of a thread
  int tile_columns;      // threads side by side in a block
  int block_rows;        // threads one above the other
  int64_t column_tiles;  // blocks side by side
  int64_t parts;         // blocks down the rows; 0 where there are none

  int64_t blocks() const { return parts * column_tiles; }

  // How many of the rows are the part's own: steps of block_rows, taken in turn.
  FUSED_RESNET_HOST_DEVICE int64_t rows_of_part(int64_t part) const {
    const int64_t round = parts * block_rows, rest = rows % round - part * block_rows;
    return rows / round * block_rows + (rest < 0 ? 0 : rest < block_rows ? rest : block_rows);
  }
};

// Channels of a thread: as many as make 16 bytes, or one where the channels or an address do not allow that.  The
// pointers are those of all activations and per-channel rows that a kernel reads or writes, null ones included; `part`
// are the channels of a tensor that lacks some.
int vector_width(const Matrix& matrix, std::initializer_list<const void*> pointers, ChannelPart part = {0, 0});

// vector: vector_width().
Plan plan(const Matrix& matrix, int vector, Occupancy occupancy, int multiprocessors);

// For kReductionOccupancy, with at most kMaxReductionParts parts.
Plan reduction_plan(const Matrix& matrix, int vector, int multiprocessors);

}  // namespace fused_resnet::cuda
