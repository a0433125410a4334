// What every kernel shares: element types, and how a dense activation looks to a loop.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};

// Half-open, as everywhere.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// Some of an activation's channels: `count` of them, from `first` on.
struct ChannelPart {
  int64_t first;
  int64_t count;
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

}  // namespace fused_resnet
