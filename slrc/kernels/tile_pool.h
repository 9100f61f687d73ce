// Maxima of windows of bytes (see PoolRows in tile.h). For tile.cpp alone.
#pragma once

#include "tile_set.h"

namespace slrc {
namespace {

constexpr int kEach = 2 * kLanes;
typedef uint16_t EachPair __attribute__((vector_size(2 * kEach)));
typedef uint16_t LooseEachPair __attribute__((vector_size(2 * kEach), aligned(1), may_alias));
typedef uint8_t EachByte __attribute__((vector_size(kEach)));
typedef uint8_t LooseEachByte __attribute__((vector_size(kEach), aligned(1), may_alias));

// (Compilers make vectors of it.)
SLRC_INLINE inline void TakeMaxima(const uint8_t* __restrict a, const uint8_t* __restrict b, int64_t count,
                                   uint8_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] > b[i] ? a[i] : b[i];
}
SLRC_INLINE inline void TakeMaxima(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

// The maxima of `taps` bytes, `step` apart, from each of `count` on; returns where they are.
SLRC_INLINE inline const uint8_t* MaximaAlong(const uint8_t* from, int64_t step, int64_t taps, int64_t count,
                                              uint8_t* to) {
  if (taps == 1) return from;
  TakeMaxima(from, from + step, count, to);
  for (int64_t k = 2; k < taps; ++k) TakeMaxima(from + k * step, count, to);
  return to;
}

// `whole`: the last pair may be read to its end.
SLRC_INLINE inline void TakeEach(const uint8_t* __restrict from, int64_t stride, int64_t count, bool whole,
                                 uint8_t* __restrict to) {
  int64_t i = 0;
  for (; stride == 2 && i + kEach <= count - !whole; i += kEach) {  // the odd bytes are the high ones of pairs
    const EachPair pairs = *reinterpret_cast<const LooseEachPair*>(from + 2 * i) & 0xff;
    *reinterpret_cast<LooseEachByte*>(to + i) = __builtin_convertvector(pairs, EachByte);
  }
  for (; i < count; ++i) to[i] = from[stride * i];
}

// First the maxima of columns, then those of neighbours, from every byte on as if all planes were one row; then those
// that are windows.
void MaxPoolRows(const PoolRows& given) {
  const PoolRows job = given;
  const int64_t last = (job.out_height - 1) * job.strides[0] * job.pitch + (job.out_width - 1) * job.strides[1];
  const int64_t count = (job.planes - 1) * job.plane + last + 1;  // where windows begin
  const uint8_t* columns = MaximaAlong(job.x, job.pitch, job.kernel[0], count + job.kernel[1] - 1, job.room);
  uint8_t* const other = job.room + count + job.kernel[1];
  const uint8_t* windows = MaximaAlong(columns, 1, job.kernel[1], count, other);
  for (int64_t p = 0; p < job.planes; ++p)
    for (int64_t i = 0; i < job.out_height; ++i)
      TakeEach(windows + p * job.plane + i * job.strides[0] * job.pitch, job.strides[1], job.out_width,
               windows != job.x, job.y + p * job.y_plane + i * job.out_width);
}

}  // namespace
}  // namespace slrc
