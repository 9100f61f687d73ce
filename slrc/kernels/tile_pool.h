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
SLRC_INLINE inline void TakeMaxima(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

SLRC_INLINE inline void TakeEach(const uint8_t* __restrict from, int64_t stride, int64_t count, uint8_t* __restrict to) {
  int64_t i = 0;
  for (; stride == 2 && i + kEach <= count; i += kEach) {  // the odd bytes are the high ones of pairs
    const EachPair pairs = *reinterpret_cast<const LooseEachPair*>(from + 2 * i) & 0xff;
    *reinterpret_cast<LooseEachByte*>(to + i) = __builtin_convertvector(pairs, EachByte);
  }
  for (; i < count; ++i) to[i] = from[stride * i];
}

// Of a row of windows first the maxima of columns, then those of neighbours. Padding is zero, the least byte.
void MaxPoolRows(const PoolRows& given) {
  const PoolRows job = given;
  const int64_t read = (job.out_width - 1) * job.strides[1] + job.kernel[1], windows = read - job.kernel[1] + 1;
  const int64_t columns = read - job.left < job.width ? read - job.left : job.width;
  uint8_t* const row = job.room;
  uint8_t* const maxima = job.room + read;  // one more than the windows is read, with the last of them
  __builtin_memset(row, 0, read);
  for (int64_t i = 0; i < job.out_height; ++i) {
    const int64_t top = i * job.strides[0] - job.top, bottom = top + job.kernel[0];
    int64_t r = top > 0 ? top : 0;
    const int64_t end = bottom < job.height ? bottom : job.height;
    __builtin_memcpy(row + job.left, job.x + r * job.width, columns);
    while (++r < end) TakeMaxima(job.x + r * job.width, columns, row + job.left);
    __builtin_memcpy(maxima, row, windows);
    for (int64_t k = 1; k < job.kernel[1]; ++k) TakeMaxima(row + k, windows, maxima);
    TakeEach(maxima, job.strides[1], job.out_width, job.y + i * job.out_width);
  }
}

}  // namespace
}  // namespace slrc
