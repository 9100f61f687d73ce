// What an int8 layer needs beside strips: four channels' bytes brought side by side, and sums made results (see tile.h).
// For tile.cpp alone.
#pragma once

#include "tile_results.h"

namespace slrc {
namespace {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t LooseBytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Pairs8 __attribute__((vector_size(16)));

// Of both, byte by byte in turn, the first half and the second.
SLRC_INLINE inline Bytes16 LowInTurn(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
SLRC_INLINE inline Bytes16 HighInTurn(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
SLRC_INLINE inline void StoreInTurn(Bytes16 a, Bytes16 b, uint8_t* to) {
  const Pairs8 low = reinterpret_cast<Pairs8>(a), high = reinterpret_cast<Pairs8>(b);
  const Pairs8 first = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
  const Pairs8 second = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
  *reinterpret_cast<LooseBytes16*>(to) = reinterpret_cast<Bytes16>(first);
  *reinterpret_cast<LooseBytes16*>(to + 16) = reinterpret_cast<Bytes16>(second);
}

void Interleave(const uint8_t* from, int64_t pitch, int64_t rows, int64_t count, uint8_t filling, Word* to) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(to);
  const Bytes16 flips = kFlip - Bytes16{}, filled = static_cast<uint8_t>(filling ^ kFlip) - Bytes16{};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16, bytes += 64) {
    Bytes16 row[4];
    Unroll<4>([&](int k) SLRC_INLINE {
      row[k] = filled;
      if (k < rows) row[k] = *reinterpret_cast<const LooseBytes16*>(from + k * pitch + i) ^ flips;
    });
    const Bytes16 low[2] = {LowInTurn(row[0], row[1]), LowInTurn(row[2], row[3])};
    const Bytes16 high[2] = {HighInTurn(row[0], row[1]), HighInTurn(row[2], row[3])};
    StoreInTurn(low[0], low[1], bytes);
    StoreInTurn(high[0], high[1], bytes + 32);
  }
  for (; i < count; ++i, bytes += 4)
    for (int64_t k = 0; k < 4; ++k) bytes[k] = (k < rows ? from[k * pitch + i] : filling) ^ kFlip;
}

#if defined(__AVX512F__)

void CopyRowsOfBytes(const uint8_t* from, int64_t from_pitch, int64_t rows, int64_t count, uint8_t* to,
                     int64_t to_pitch) {
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch)
    for (int64_t i = 0; i < count; i += 64) {
      const __mmask64 mask = FirstBits<4>(count - i);
      _mm512_mask_storeu_epi8(to + i, mask, _mm512_maskz_loadu_epi8(mask, from + i));
    }
}

// Up to four vectors of a row; `left` results are.
template <Making M, bool Quantized, int Vectors>
SLRC_INLINE inline void FinishGroup(const Int8Results& job, int64_t row, int64_t at, int64_t left, __m512 of_row) {
  const uint64_t bits = FirstBits<Vectors>(left);
  const Word* const sums = job.sums + row * job.sums_pitch + at;
  const int64_t there = row * job.pitch + at;
  __m512 real[Vectors];
  Unroll<Vectors>([&](int v) SLRC_INLINE {
    const __mmask16 mask = static_cast<__mmask16>(bits >> 16 * v);
    const __m512 scale = job.by_lane ? _mm512_maskz_loadu_ps(mask, job.scale + at + 16 * v) : of_row;
    real[v] = RealOf<M>(job, _mm512_maskz_loadu_epi32(mask, sums + 16 * v), scale, mask, there + 16 * v);
    if constexpr (!Quantized) _mm512_mask_storeu_ps(job.y_float + there + 16 * v, mask, real[v]);
  });
  if constexpr (Quantized) StoreQuantized<Vectors>(job, real, bits, there);
}

template <Making M, bool Quantized>
void FinishRows(const Int8Results& given) {
  const Int8Results job = given;
  for (int64_t row = 0; row < job.rows; ++row) {
    const __m512 of_row = _mm512_set1_ps(job.scale[job.by_lane ? 0 : row]);
    int64_t at = 0;
    for (; job.count - at > 48; at += 64) FinishGroup<M, Quantized, 4>(job, row, at, job.count - at, of_row);
    const int64_t left = job.count - at;
    if (left > 32) FinishGroup<M, Quantized, 3>(job, row, at, left, of_row);
    else if (left > 16) FinishGroup<M, Quantized, 2>(job, row, at, left, of_row);
    else if (left > 0) FinishGroup<M, Quantized, 1>(job, row, at, left, of_row);
  }
}

#else

// N bytes at a time; the last may be copied twice. (Rows are short: a call of memcpy for each would cost more.)
template <int64_t N>
SLRC_INLINE inline void CopyRow(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i + N < count; i += N) __builtin_memcpy(to + i, from + i, N);
  __builtin_memcpy(to + count - N, from + count - N, N);
}

void CopyRowsOfBytes(const uint8_t* from, int64_t from_pitch, int64_t rows, int64_t count, uint8_t* to,
                     int64_t to_pitch) {
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) {
    if (count >= 16) CopyRow<16>(from, count, to);
    else if (count >= 8) CopyRow<8>(from, count, to);
    else if (count >= 4) CopyRow<4>(from, count, to);
    else for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// One vector of a row.
template <Making M, bool Quantized>
SLRC_INLINE inline void Finish(const Int8Results& job, const Word* sums, Real scale, int64_t at) {
  const Real real = RealOf<M>(job, Load<kLanes>(sums), scale, at);
  if constexpr (Quantized) StoreBytes(job.y + at, QuantizedOf(job, real));
  else Store<kLanes>(job.y_float + at, real);
}

// A row of fewer than a vector's: computed aside.
template <Making M, bool Quantized>
void FinishFew(const Int8Results& job, int64_t row) {
  Word sums[kLanes] = {};
  float scale[kLanes] = {}, y_float[kLanes];
  uint8_t residual[kLanes] = {}, y[kLanes];
  for (int64_t i = 0; i < job.count; ++i) {
    sums[i] = job.sums[row * job.sums_pitch + i];
    scale[i] = job.scale[job.by_lane ? i : row];
    if (job.residual) residual[i] = job.residual[row * job.pitch + i];
  }
  Int8Results aside = job;
  aside.residual = job.residual ? residual : nullptr;
  aside.y = y;
  aside.y_float = y_float;
  Finish<M, Quantized>(aside, sums, Load<kLanes>(scale), 0);
  for (int64_t i = 0; i < job.count; ++i)
    if constexpr (Quantized) job.y[row * job.pitch + i] = y[i];
    else job.y_float[row * job.pitch + i] = y_float[i];
}

// The last vector ends with the row: some results are computed twice.
template <Making M, bool Quantized>
void FinishRows(const Int8Results& given) {
  const Int8Results job = given;
  for (int64_t row = 0; row < job.rows; ++row) {
    if (job.count < kLanes) {
      FinishFew<M, Quantized>(job, row);
      continue;
    }
    const Word* const sums = job.sums + row * job.sums_pitch;
    const int64_t at = row * job.pitch;
    const Real of_row = job.by_lane ? Real{} : All<kLanes>(job.scale[row]);
    for (int64_t i = 0; i < job.count;) {
      const int64_t from = i + kLanes <= job.count ? i : job.count - kLanes;
      Finish<M, Quantized>(job, sums + from, job.by_lane ? Load<kLanes>(job.scale + from) : of_row, at + from);
      i = from + kLanes;
    }
  }
}

#endif

void MakeResults(const Int8Results& job) {
  ForMaking(job, [&](auto making) {
    if (job.y) FinishRows<making.kMaking, true>(job);
    else FinishRows<making.kMaking, false>(job);
  });
}

}  // namespace
}  // namespace slrc
