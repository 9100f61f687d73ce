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

typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef uint8_t LooseBytes __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
constexpr int64_t kBytes = 4 * kLanes;

// The maxima of `taps` bytes, `step` apart (`Taps`, if not 0), from each of `count` on.
template <int Taps>
SLRC_INLINE inline void TakeMaxima(const uint8_t* from, int64_t step, int64_t taps, int64_t count, uint8_t* to) {
  if (Taps) taps = Taps;
  const auto take = [&](int64_t i) SLRC_INLINE {
    Bytes most = *reinterpret_cast<const LooseBytes*>(from + i);
    for (int64_t k = 1; k < taps; ++k) {
      const Bytes other = *reinterpret_cast<const LooseBytes*>(from + i + k * step);
      most = most > other ? most : other;
    }
    *reinterpret_cast<LooseBytes*>(to + i) = most;
  };
  int64_t i = 0;
  for (; i + kBytes <= count; i += kBytes) take(i);
  if (i < count && i) take(count - kBytes);  // some twice
  for (; count < kBytes && i < count; ++i) {
    to[i] = from[i];
    for (int64_t k = 1; k < taps; ++k) to[i] = to[i] > from[i + k * step] ? to[i] : from[i + k * step];
  }
}

// The same, of one byte each too; returns where they are.
SLRC_INLINE inline const uint8_t* MaximaAlong(const uint8_t* from, int64_t step, int64_t taps, int64_t count,
                                              uint8_t* to) {
  if (taps == 1) return from;
  if (taps == 2) TakeMaxima<2>(from, step, taps, count, to);
  else if (taps == 3) TakeMaxima<3>(from, step, taps, count, to);
  else TakeMaxima<0>(from, step, taps, count, to);
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

// First the maxima of columns, from every byte on as if all planes were one row; where y takes some rows and those are
// wide, of these alone, side by side. Then those of neighbours, and then those that are windows.
void MaxPoolRows(const PoolRows& given) {
  const PoolRows job = given;
  const int64_t down = job.strides[0], along = job.strides[1];
  const int64_t read = (job.out_width - 1) * along + job.kernel[1];  // of a row
  const bool apart = down > 1 && job.kernel[0] > 1 && read >= kBytes;
  const int64_t pitch = apart ? read : down * job.pitch, plane = apart ? job.out_height * read : job.plane;
  const int64_t count = (job.planes - 1) * plane + (job.out_height - 1) * pitch + read;
  const uint8_t* columns = job.room;
  if (!apart) columns = MaximaAlong(job.x, job.pitch, job.kernel[0], count, job.room);
  for (int64_t p = 0; apart && p < job.planes; ++p)
    for (int64_t i = 0; i < job.out_height; ++i)
      MaximaAlong(job.x + p * job.plane + i * down * job.pitch, job.pitch, job.kernel[0], read,
                  job.room + p * plane + i * pitch);
  const uint8_t* windows = MaximaAlong(columns, 1, job.kernel[1], count - job.kernel[1] + 1, job.room + count);
  for (int64_t p = 0; p < job.planes; ++p)
    for (int64_t i = 0; i < job.out_height; ++i)
      TakeEach(windows + p * plane + i * pitch, along, job.out_width, windows != job.x,
               job.y + p * job.y_plane + i * job.out_width);
}

}  // namespace
}  // namespace slrc
