// Copies of the input: see CopyJob. For tile.cpp alone.
#pragma once

#include "tile_set.h"

namespace slrc {
namespace {

// Lane i is p[i * Stride].
template <int Stride>
inline Lanes<kLanes>::Float LoadApart(const float* p) {
  const auto a = Load<kLanes>(p);
  if constexpr (Stride == 1) return a;
  const auto b = Load<kLanes>(p + kLanes);
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  const auto pairs = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14);  // within halves: the cheaper shuffle
  return __builtin_shufflevector(pairs, pairs, 0, 1, 4, 5, 2, 3, 6, 7);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

// All bits of the first `count` lanes.
SLRC_INLINE inline Lanes<kLanes>::Bits FirstLanes(int64_t count) {
  static const uint32_t kMask[2 * kMaxLanes] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u,
                                                ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  using Bits = typename Lanes<kLanes>::Bits;
  return reinterpret_cast<Bits>(Load<kLanes>(reinterpret_cast<const float*>(kMask + kMaxLanes - count)));
}

// One channel's rows of a run, in whole vectors: reads past their end.
template <int Stride>
SLRC_INLINE inline void CopyRows(const float* source, float* target, const CopyRun& run, Lanes<kLanes>::Bits padding) {
  using Bits = typename Lanes<kLanes>::Bits;
  const int64_t whole = run.floats / kLanes * kLanes, rest = run.floats - whole;
  const Bits mask = FirstLanes(rest);
  for (int64_t row = 0; row < run.rows; ++row, source += run.from_step, target += run.to_step) {
    int64_t i = 0;
    for (; i < whole; i += kLanes) Store<kLanes>(target + i, LoadApart<Stride>(source + i * Stride));
    if (rest) {
      const auto last = (reinterpret_cast<Bits>(LoadApart<Stride>(source + i * Stride)) & mask) | (padding & ~mask);
      Store<kLanes>(target + i, reinterpret_cast<typename Lanes<kLanes>::Float>(last));
      i += kLanes;
    }
    for (; i < run.written; i += kLanes)
      Store<kLanes>(target + i, reinterpret_cast<typename Lanes<kLanes>::Float>(padding));
  }
}

template <int Stride>
inline void CopyChannels(const CopyJob& given) {
  const CopyJob job = given;
  const auto padding = AllBits<kLanes>(job.padding);
  // Of so many channels whole vectors may be read (and written); of the others as many as there are floats for.
  const int64_t readable = Stride ? (job.readable - Stride * kLanes) / job.x_step : 0;
  const int64_t most = job.channels - job.together, free = readable < most ? readable : most;
  const float* x = job.x;
  float* to = job.to;
  int64_t c = 0;
  if constexpr (Stride > 0) {
    constexpr int64_t kTogether = 16;  // small enough to stay cached
    const int64_t x_step = kTogether * job.x_step, to_step = kTogether * job.to_step;
    for (; job.together && c + kTogether <= free; c += kTogether, x += x_step, to += to_step)
      for (const CopyRun* run = job.runs; run != job.runs + job.run_count; ++run) {
        CopyRun all = *run;  // the channels as its rows
        all.rows = kTogether;
        all.from_step = static_cast<int32_t>(job.x_step);
        all.to_step = static_cast<int32_t>(job.to_step);
        CopyRows<Stride>(x + run->from, to + run->to, all, padding);
      }
  }
  for (; c < job.channels; ++c, x += job.x_step, to += job.to_step) {
    for (const CopyRun* run = job.runs; run != job.runs + job.run_count; ++run) {
      if constexpr (Stride > 0)
        if (c < free) {
          CopyRows<Stride>(x + run->from, to + run->to, *run, padding);
          continue;
        }
      for (int64_t row = 0; row < run->rows; ++row) {
        const float* source = x + run->from + row * run->from_step;
        float* target = to + run->to + row * run->to_step;
        int64_t i = 0;
        if constexpr (Stride > 0)
          for (; i + kLanes <= run->floats && source + (i + kLanes) * Stride <= job.x + job.readable; i += kLanes)
            Store<kLanes>(target + i, LoadApart<Stride>(source + i * Stride));
        for (; i < run->floats; ++i) target[i] = source[i * job.stride];
        for (; i < run->written; ++i) target[i] = job.padding;
      }
    }
  }
}

void Copy(const CopyJob& job) {
  switch (job.stride) {
    case 1:
      return CopyChannels<1>(job);
    case 2:
      return CopyChannels<2>(job);
    default:
      return CopyChannels<0>(job);
  }
}

}  // namespace
}  // namespace slrc
