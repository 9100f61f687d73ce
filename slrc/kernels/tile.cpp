// See tile.h. SLRC_TILE_SET names the set that this compilation defines; the compiler's flags choose the instructions.
#include <utility>

#include "lanes.h"
#include "processor.h"
#include "tile.h"

namespace slrc {
namespace {

// With a sanitizer's checks compilers take many minutes for tiles of so many sizes; fewer go through the same lines.
#if defined(__AVX512F__) && defined(__SANITIZE_ADDRESS__)
constexpr int kLanes = 16, kVectors4 = 1, kVectors8 = 2;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kVectors4 = 6, kVectors8 = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors4 = 3, kVectors8 = 0;
#elif defined(SLRC_TILE_NEON)
constexpr int kLanes = 4, kVectors4 = 6, kVectors8 = 3;
#else
constexpr int kLanes = 4, kVectors4 = 3, kVectors8 = 0;
#endif
constexpr int kVectors1 = 2;  // of several runs
constexpr bool kManyRegisters = kVectors8 > 0;  // 32, not 16

// How many runs a tile takes: one row alone keeps too few sums for multiply-adds not to wait for each other.
constexpr int RunsOf(int rows, int vectors) {
#if defined(__SANITIZE_ADDRESS__)
  constexpr int kSums = 2;
#else
  constexpr int kSums = 8;
#endif
  return rows > 1 || vectors > kSums ? 1 : kSums / vectors;
}

#define SLRC_INLINE __attribute__((always_inline))

// The values of a column: NEON multiplies by a lane of a register, so they are loaded four at a time; the others
// broadcast each from memory.
#if defined(SLRC_TILE_NEON)
#define SLRC_LOAD_VALUES(Rows, values) \
  Lanes<4>::Float fours[Rows / 4];     \
  Unroll<Rows / 4>([&](int f) SLRC_INLINE { fours[f] = Load<4>(values + 4 * f); })
#define SLRC_VALUE(i) fours[(i) / 4][(i) % 4]
#else
#define SLRC_LOAD_VALUES(Rows, values)
#define SLRC_VALUE(i) values[i]
#endif

// Returns v, which is not loaded again at each use: of loads that cross a cache line that would be felt.
template <class V>
SLRC_INLINE inline V InRegister(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Calls body(0), ..., body(Count - 1), written out early enough for the compiler to keep arrays in registers.
template <int Count, class Body>
SLRC_INLINE inline void Unroll(const Body& body) {
  if constexpr (Count > 0) {
    Unroll<Count - 1>(body);
    body(Count - 1);
  }
}

// The lanes of v that `kept` has a bit of, side by side; and back, with zeros for the others. (Of other instruction sets
// nothing does it faster than storing all and copying.)
#if defined(__AVX512F__)
constexpr bool kMasks = true;
template <int N>
SLRC_INLINE inline void StoreKept(float* p, typename Lanes<N>::Float v, uint32_t kept) {
  const uint32_t first = (1u << __builtin_popcount(kept)) - 1;
  if constexpr (N == 16) _mm512_mask_storeu_ps(p, first, _mm512_maskz_compress_ps(kept, v));
  else _mm256_mask_storeu_ps(p, first, _mm256_maskz_compress_ps(kept, v));
}
template <int N>
SLRC_INLINE inline typename Lanes<N>::Float LoadKept(const float* p, uint32_t kept) {
  const uint32_t first = (1u << __builtin_popcount(kept)) - 1;
  if constexpr (N == 16) return _mm512_maskz_expand_ps(kept, _mm512_maskz_loadu_ps(first, p));
  else return _mm256_maskz_expand_ps(kept, _mm256_maskz_loadu_ps(first, p));
}
// Zeros for the lanes that `read` has no bit of.
template <int N>
SLRC_INLINE inline typename Lanes<N>::Float LoadLanes(const float* p, uint32_t read) {
  if constexpr (N == 16) return _mm512_maskz_loadu_ps(read, p);
  else return _mm256_maskz_loadu_ps(read, p);
}
#else
constexpr bool kMasks = false;
template <int N>
void StoreKept(float*, typename Lanes<N>::Float, uint32_t);
template <int N>
typename Lanes<N>::Float LoadKept(const float*, uint32_t);
template <int N>
typename Lanes<N>::Float LoadLanes(const float*, uint32_t);
#endif

// How many floats of the values are prefetched ahead: a page, since a processor's own prefetching stops at its end, and
// weights that were driven from the caches would be waited for at the beginning of each.
constexpr int kValuesAhead = 1024, kLine = 16;

// How a tile reads x: all, all and what the next tile reads ahead, or some lanes, by groups of taps (see Strip).
enum Reads { kAll, kAhead, kSome };

// Rows of one block row on some runs of pixels.
struct Tile {
  const float* values;
  const int32_t* offsets;
  const int32_t* end;  // of the offsets
  const float* x;
  const float* bias;
  const float* start;
  int64_t start_pitch;
  float* y;
  int64_t pitch;
  int64_t rows;
  int64_t x_step, y_step;  // as in Strip
  PixelMore more;
  const int32_t* tap_ends;  // of the block row
};

// Calls run(tile, runs) for every `Rows` rows (the last of a block may have fewer), up to `Runs` runs at a time.
template <int Rows, int Runs, class Run>
SLRC_INLINE inline void ForTiles(const Strip& s, const Run& run) {
  static const float kZeros[Rows] = {};
  // About as many runs in each tile, known before the loop: a division takes as long as some columns.
  const int64_t tiles = (s.runs + Runs - 1) / Runs, few = Runs > 1 ? s.runs / tiles : 1, more = s.runs - few * tiles;
  int64_t first = 0;
  for (int64_t r = 0; first < s.channels; ++r, first += s.block) {
    const int64_t begin = s.begins[r], end = s.ends[r];
    const int64_t last = first + s.block < s.channels ? first + s.block : s.channels;
    for (int64_t channel = first; channel < last; channel += Rows) {
      Tile tile = {s.values + begin * s.block + (channel - first),
                   s.offsets + begin,
                   s.offsets + end,
                   s.x,
                   s.bias ? s.bias + channel : kZeros,
                   s.start ? s.start + channel * s.start_pitch : nullptr,
                   s.start_pitch,
                   s.y + channel * s.pitch,
                   s.pitch,
                   last - channel < Rows ? last - channel : Rows,
                   s.x_step,
                   s.y_step,
                   s.more,
                   s.tap_ends ? s.tap_ends + r * s.taps : nullptr};
      tile.more.offsets += begin;
      tile.more.y += channel * s.more.pitch;
      if (tile.more.start) tile.more.start += channel * s.more.start_pitch;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t runs = few + (t < more);
        run(tile, runs);
        tile.x += runs * s.x_step;
        tile.y += runs * s.y_step;
        if (tile.start) tile.start += runs * s.y_step;
        tile.more.x += runs * s.x_step;
        tile.more.y += runs * s.y_step;
        if (tile.more.start) tile.more.start += runs * s.y_step;
      }
    }
  }
}

// Rows (one run) or runs (one row) x (Whole vectors + one of Last lanes) accumulators in registers. Of several rows a
// surviving column loads each vector of x once for all; of one row a value is loaded once for all runs, and a vector of
// x once for all of the `Window` parts of the columns (see Strip). If there is a `Pixel` more, the lanes of its sums are
// the rows: a multiply-add for each column, not for each column and row.
template <int Rows, int Runs, int Window, int Whole, int Last, int Pixel, Reads Read>
SLRC_INLINE inline void RunTile(const Tile& tile, const Strip& strip) {
  static_assert(Rows == 1 ? !Pixel && Read == kAll : Runs == 1 && Window == 1);
  const int64_t stride = strip.block, ahead = strip.ahead;
  const Activation activation = strip.activation;
  const float slope = strip.slope;
  using V = typename Lanes<kLanes>::Float;
  using L = typename Lanes<Last>::Float;
  constexpr int kSums = Rows * Runs;
  constexpr int kLines = (Whole * kLanes + Last + kLine - 1) / kLine;  // of x, in a run
  constexpr int kSide = Rows < kLanes ? Rows : kLanes;  // rows side by side in the sums of a pixel more
  V sums[kSums][Whole ? Whole : 1];
  L lasts[kSums];
  typename Lanes<kSide>::Float more[Rows / kSide];
  if constexpr (Pixel > 0)
    Unroll<Rows / kSide>([&](int q) SLRC_INLINE { more[q] = Load<kSide>(tile.bias + q * kSide); });
  Unroll<kSums>([&](int s) SLRC_INLINE {
    const float bias = tile.bias[Rows == 1 ? 0 : s];
    Unroll<Whole>([&](int v) SLRC_INLINE { sums[s][v] = All<kLanes>(bias); });
    lasts[s] = All<Last>(bias);
  });
  constexpr bool kMayLeaveGaps = kMasks && Rows > 1;
  const Outputs* const outputs = kMayLeaveGaps ? strip.outputs : nullptr;
  if constexpr (kMayLeaveGaps)
    if (tile.start && outputs)
      Unroll<kSums>([&](int s) SLRC_INLINE {
        const float* start = tile.start + s * tile.start_pitch;
        Unroll<Whole>([&](int v) SLRC_INLINE {
          sums[s][v] += LoadKept<kLanes>(start + outputs->at[v], outputs->kept[v]);
        });
        lasts[s] += LoadKept<Last>(start + outputs->at[Whole], outputs->kept[Whole]);
      });
  if (tile.start && !outputs)
    Unroll<kSums>([&](int s) SLRC_INLINE {
      const float* start = tile.start + s * (Rows == 1 ? tile.y_step : tile.start_pitch);
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[s][v] += Load<kLanes>(start + v * kLanes); });
      lasts[s] += Load<Last>(start + Whole * kLanes);
    });
  if (Pixel && tile.more.start)
    Unroll<kSums>([&](int s) SLRC_INLINE { more[s / kSide][s % kSide] += tile.more.start[s * tile.more.start_pitch]; });

  const float* values = tile.values;
  if constexpr (Rows == 1) {
    const int64_t part = (tile.end - tile.offsets) / Window;
    for (int64_t t = 0; t < part; ++t, values += stride) {
      const float* x = tile.x + tile.offsets[t];
      float value[Window];
      Unroll<Window>([&](int k) SLRC_INLINE { value[k] = values[k * part * stride]; });
      Unroll<Runs + Window - 1>([&](int r) SLRC_INLINE {
        V column[Whole ? Whole : 1];
        Unroll<Whole>([&](int v) SLRC_INLINE { column[v] = InRegister(Load<kLanes>(x + v * kLanes)); });
        const L last = InRegister(Load<Last>(x + Whole * kLanes));
        Unroll<Window>([&](int k) SLRC_INLINE {
          const int s = r - k;
          if (s < 0 || s >= Runs) return;
          Unroll<Whole>([&](int v) SLRC_INLINE { sums[s][v] += column[v] * value[k]; });
          lasts[s] += last * value[k];
        });
        x += tile.x_step;
      });
    }
  } else {
    const int32_t *offset = tile.offsets, *more_offset = tile.more.offsets;
    const int64_t groups = Read == kSome ? strip.group_count : 1;
    for (int64_t g = 0; g < groups; ++g) {
      const Taps* const taps = Read == kSome ? strip.groups + g : nullptr;
      const int32_t* const end = Read == kSome ? strip.offsets + tile.tap_ends[taps->last - 1] : tile.end;
      const auto load = [&](auto* vector, const float* x, int v) SLRC_INLINE {
        constexpr int kCount = sizeof *vector / sizeof(float);
        if constexpr (Read == kSome) *vector = LoadLanes<kCount>(x + v * kLanes, taps->read[v]);
        else *vector = Load<kCount>(x + v * kLanes);
      };
      for (; offset != end; ++offset, ++more_offset, values += stride) {
        const float* x = tile.x + *offset;
        V column[Whole ? Whole : 1];
        L last;
        Unroll<Whole>([&](int v) SLRC_INLINE { load(&column[v], x, v); });
        load(&last, x, Whole);
        __builtin_prefetch(values + kValuesAhead);
        if constexpr (Read == kAhead)
          Unroll<kLines>([&](int line) SLRC_INLINE { __builtin_prefetch(x + ahead + line * kLine); });
        SLRC_LOAD_VALUES(Rows, values);
        Unroll<Rows>([&](int i) SLRC_INLINE {
          Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] += column[v] * SLRC_VALUE(i); });
          lasts[i] += last * SLRC_VALUE(i);
        });
        if constexpr (Pixel > 0) {
          const float pixel = Read != kSome || taps->read[Whole + 1] ? tile.more.x[*more_offset] : 0.0f;
          Unroll<Rows / kSide>([&](int q) SLRC_INLINE { more[q] += Load<kSide>(values + q * kSide) * pixel; });
        }
      }
    }
  }

  const auto apply = [&](auto function) SLRC_INLINE {
    Unroll<kSums>([&](int s) SLRC_INLINE {
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[s][v] = function(sums[s][v]); });
      lasts[s] = function(lasts[s]);
    });
    if constexpr (Pixel > 0) Unroll<Rows / kSide>([&](int q) SLRC_INLINE { more[q] = function(more[q]); });
  };
  if (activation == kRelu || activation == kRelu6)
    apply([](auto v) SLRC_INLINE { return AtLeast<sizeof v / sizeof(float)>(v, 0.0f); });
  if (activation == kRelu6) apply([](auto v) SLRC_INLINE { return AtMost<sizeof v / sizeof(float)>(v, 6.0f); });
  if (activation == kLeakyRelu) apply([slope](auto v) SLRC_INLINE { return v < 0.0f ? v * slope : v; });
  const int64_t y_pitch = Rows == 1 ? tile.y_step : tile.pitch;
  if constexpr (kMayLeaveGaps)
    if (outputs)
      Unroll<kSums>([&](int s) SLRC_INLINE {
        float* y = tile.y + s * y_pitch;
        Unroll<Whole>([&](int v) SLRC_INLINE { StoreKept<kLanes>(y + outputs->at[v], sums[s][v], outputs->kept[v]); });
        StoreKept<Last>(y + outputs->at[Whole], lasts[s], outputs->kept[Whole]);
      });
  if (!outputs)
    Unroll<kSums>([&](int s) SLRC_INLINE {
      float* y = tile.y + s * y_pitch;
      Unroll<Whole>([&](int v) SLRC_INLINE { Store<kLanes>(y + v * kLanes, sums[s][v]); });
      Store<Last>(y + Whole * kLanes, lasts[s]);
    });
  if (Pixel && outputs && !outputs->kept[Whole + 1]) return;
  if (!IsCheap(activation)) {
    if constexpr (Pixel > 0)
      Unroll<Rows / kSide>([&](int q) SLRC_INLINE { more[q] = Activate<kSide>(more[q], activation, slope); });
    for (int s = 0; s < kSums; ++s)
      for (int p = 0; p < Whole * kLanes + Last; p += Last) {
        float* y = tile.y + s * y_pitch + p;
        Store<Last>(y, Activate<Last>(Load<Last>(y), activation, slope));
      }
  }
  if constexpr (Pixel > 0)
    Unroll<kSums>([&](int s) SLRC_INLINE { tile.more.y[s * tile.more.pitch] = more[s / kSide][s % kSide]; });
}

// A tile of `runs` runs, up to `Most`.
template <int Rows, int Most, int Whole, int Last, int Pixel>
SLRC_INLINE inline void RunTiles(const Tile& tile, int64_t runs, const Strip& s) {
  if constexpr (Most > 1)
    if (runs < Most) return RunTiles<Rows, Most - 1, Whole, Last, Pixel>(tile, runs, s);
  if constexpr (Most > 1)
    if (s.window == kWindow) return RunTile<Rows, Most, kWindow, Whole, Last, 0, kAll>(tile, s);
#if !defined(__SANITIZE_ADDRESS__)  // a prefetch is not checked
  if constexpr (Rows > 1 && kManyRegisters)
    if (s.ahead) return RunTile<Rows, Most, 1, Whole, Last, Pixel, kAhead>(tile, s);
#endif
  if constexpr (Rows > 1 && kMasks)
    if (s.groups) return RunTile<Rows, Most, 1, Whole, Last, Pixel, kSome>(tile, s);
  RunTile<Rows, Most, 1, Whole, Last, Pixel, kAll>(tile, s);
}

// A tile of fewer rows is computed whole, aside.
template <int Rows, int Whole, int Last, int Pixel>
void RunStrip(const Strip& strip) {
  constexpr int kPixels = Whole * kLanes + Last;
  const Strip s = strip;  // a copy that no store can reach
  constexpr int kRuns = RunsOf(Rows, Whole + 1);
  ForTiles<Rows, kRuns>(s, [&](Tile tile, int64_t runs) SLRC_INLINE {
    if (tile.rows == Rows) return RunTiles<Rows, kRuns, Whole, Last, Pixel>(tile, runs, s);
    alignas(64) float aside[Rows * kPixels], more_aside[Rows];
    Tile whole = tile;
    Strip plain = s;
    plain.outputs = nullptr;
    const auto is_output = [&](int p) { return !s.outputs || s.outputs->kept[p / kLanes] >> p % kLanes & 1; };
    for (int i = 0; i < tile.rows; ++i) {
      for (int p = 0, at = 0; tile.start && p < kPixels; ++p)
        aside[i * kPixels + p] = is_output(p) ? tile.start[i * tile.start_pitch + at++] : 0.0f;
      if (Pixel && tile.more.start) more_aside[i] = tile.more.start[i * tile.more.start_pitch];
    }
    if (tile.start) whole.start = aside;
    if (tile.more.start) whole.more.start = more_aside;
    whole.y = aside;
    whole.start_pitch = whole.pitch = kPixels;
    whole.more.y = more_aside;
    whole.more.start_pitch = whole.more.pitch = 1;
    RunTiles<Rows, kRuns, Whole, Last, Pixel>(whole, runs, plain);
    for (int i = 0; i < tile.rows; ++i) {
      for (int p = 0, at = 0; p < kPixels; ++p)
        if (is_output(p)) tile.y[i * tile.pitch + at++] = aside[i * kPixels + p];
      if (Pixel && is_output(kPixels)) tile.more.y[i * tile.more.pitch] = more_aside[i];
    }
  });
}

// One pixel: the lanes are the rows. Four sums, since one would wait for itself at each step.
template <int Rows>
void RunPixel(const Strip& s) {
  using V = typename Lanes<Rows>::Float;
  ForTiles<Rows, 1>(s, [&](const Tile& tile, int64_t) {
    V sums[4] = {Load<Rows>(tile.bias)};
    const int64_t count = tile.end - tile.offsets;
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
      const float* values = tile.values + t * s.block;
      for (int64_t line = 0; line < 4 * s.block; line += kLine) __builtin_prefetch(values + kValuesAhead + line);
      for (int k = 0; k < 4; ++k) sums[k] += Load<Rows>(values + k * s.block) * tile.x[tile.offsets[t + k]];
    }
    for (; t < count; ++t) sums[0] += Load<Rows>(tile.values + t * s.block) * tile.x[tile.offsets[t]];
    V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; tile.start && i < tile.rows; ++i) sum[i] += tile.start[i * tile.start_pitch];
    sum = Activate<Rows>(sum, s.activation, s.slope);
    for (int i = 0; i < tile.rows; ++i) tile.y[i * tile.pitch] = sum[i];
  });
}

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
SLRC_INLINE inline void CopyRows(const float* source, float* target, const Run& run) {
  using Bits = typename Lanes<kLanes>::Bits;
  const int64_t whole = run.floats / kLanes * kLanes, rest = run.floats - whole;
  const Bits mask = FirstLanes(rest);
  for (int64_t row = 0; row < run.rows; ++row, source += run.from_step, target += run.to_step) {
    int64_t i = 0;
    for (; i < whole; i += kLanes) Store<kLanes>(target + i, LoadApart<Stride>(source + i * Stride));
    if (rest) {
      const auto last = reinterpret_cast<Bits>(LoadApart<Stride>(source + i * Stride)) & mask;
      Store<kLanes>(target + i, reinterpret_cast<typename Lanes<kLanes>::Float>(last));
      i += kLanes;
    }
    for (; i < run.written; i += kLanes) Store<kLanes>(target + i, All<kLanes>(0.0f));
  }
}

template <int Stride>
inline void CopyChannels(const CopyJob& given) {
  const CopyJob job = given;
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
      for (const Run* run = job.runs; run != job.runs + job.run_count; ++run) {
        Run all = *run;  // the channels as its rows
        all.rows = kTogether;
        all.from_step = static_cast<int32_t>(job.x_step);
        all.to_step = static_cast<int32_t>(job.to_step);
        CopyRows<Stride>(x + run->from, to + run->to, all);
      }
  }
  for (; c < job.channels; ++c, x += job.x_step, to += job.to_step) {
    for (const Run* run = job.runs; run != job.runs + job.run_count; ++run) {
      if constexpr (Stride > 0)
        if (c < free) {
          CopyRows<Stride>(x + run->from, to + run->to, *run);
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
        for (; i < run->written; ++i) target[i] = 0.0f;
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

// In vectors of N; the last floats may be copied twice. Rows are short: a call of memcpy for each would cost more.
template <int N>
SLRC_INLINE inline void CopyRow(const float* from, float* to, int64_t floats) {
  if constexpr (N == 1) {
    for (int64_t i = 0; i < floats; ++i) to[i] = from[i];
  } else if (floats < N) {
    CopyRow<N == 4 ? 1 : N / 2>(from, to, floats);
  } else {
    for (int64_t i = 0; i + N < floats; i += N) Store<N>(to + i, Load<N>(from + i));
    Store<N>(to + floats - N, Load<N>(from + floats - N));
  }
}

void CopyEachRow(const float* from, int64_t from_pitch, int64_t rows, int64_t floats, float* to, int64_t to_pitch) {
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) CopyRow<kLanes>(from, to, floats);
}

// Lane l is lane At(l) of a and b, one after the other.
template <class Order, class V, int... L>
SLRC_INLINE inline V Shuffle(V a, V b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, Order::At(L)...);
}

// Of every four lanes the first two (or, `High`, the last two) of a and b in turn: one by one, or as pairs.
template <bool High>
struct Floats {
  static constexpr int At(int l) { return l / 4 * 4 + 2 * High + l % 4 / 2 + l % 2 * kLanes; }
};
template <bool High>
struct Pairs {
  static constexpr int At(int l) { return l / 4 * 4 + 2 * High + l % 2 + l % 4 / 2 * kLanes; }
};
// The first (last) half of a, then that of b.
template <bool High>
struct Halves {
  static constexpr int At(int l) { return l % (kLanes / 2) + High * kLanes / 2 + l / (kLanes / 2) * kLanes; }
};
// Every other four lanes of a, then those of b.
template <bool High>
struct Fours {
  static constexpr int At(int l) { return l / 4 % 2 * 8 + 4 * High + l % 4 + l / 8 * kLanes; }
};

// rows[r] and rows[r + Apart] become Order<false> and Order<true> of both, for every such pair of each 2 Apart rows.
template <template <bool> class Order, int Apart>
SLRC_INLINE inline void Stage(Lanes<kLanes>::Float (&rows)[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  Unroll<kLanes>([&](int r) SLRC_INLINE {
    if (r & Apart) return;
    const auto a = rows[r], b = rows[r + Apart];
    rows[r] = Shuffle<Order<false>>(a, b, kAll);
    rows[r + Apart] = Shuffle<Order<true>>(a, b, kAll);
  });
}

// Which column rows[r] is after TransposeSquare: bits 0 and 1 of r change places, of 16 rows also bits 2 and 3.
constexpr int ColumnOf(int r) {
  const int low = (r & 1) << 1 | (r & 2) >> 1;
  return low | (kLanes == 16 ? (r & 4) << 1 | (r & 8) >> 1 : r & 4);
}

// Transposes a square of as many rows as lanes.
SLRC_INLINE inline void TransposeSquare(Lanes<kLanes>::Float (&rows)[kLanes]) {
  Stage<Floats, 1>(rows);  // of rows 4 R, 4 R + 1 (4 R + 2, 4 R + 3): columns 4 g, 4 g + 1 (4 g + 2, 4 g + 3) of each
  Stage<Pairs, 2>(rows);
  if constexpr (kLanes >= 8) Stage<Halves, 4>(rows);
  if constexpr (kLanes == 16) Stage<Fours, 8>(rows);
}
// Whole lines are read and written: one by one, those of rows a power of two apart would drive each other from the cache.
void Transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t floats, float* to, int64_t to_pitch) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_floats = floats / kLanes * kLanes;
  for (int64_t i = 0; i < whole_rows; i += kLanes)
    for (int64_t j = 0; j < whole_floats; j += kLanes) {
      Lanes<kLanes>::Float square[kLanes];
      Unroll<kLanes>([&](int r) SLRC_INLINE { square[r] = Load<kLanes>(from + (i + r) * from_pitch + j); });
      TransposeSquare(square);
      Unroll<kLanes>([&](int r) SLRC_INLINE { Store<kLanes>(to + (j + ColumnOf(r)) * to_pitch + i, square[r]); });
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_floats : 0; j < floats; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
}

// Keeps a NaN of either.
template <class V>
SLRC_INLINE inline V Greater(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

template <bool Odd>
struct Alternate {
  static constexpr int At(int l) { return 2 * l + Odd; }
};

// The windows of two rows from the j-th on, N at a time and then fewer.
template <int N>
SLRC_INLINE inline void PoolRows(const float* x, int64_t width, int64_t j, float* y) {
  constexpr auto kAll = std::make_integer_sequence<int, N>();
  for (; j + N <= width / 2; j += N) {
    const auto a = Greater(Load<N>(x + 2 * j), Load<N>(x + 2 * j + width));
    const auto b = Greater(Load<N>(x + 2 * j + N), Load<N>(x + 2 * j + N + width));
    Store<N>(y + j, Greater(Shuffle<Alternate<false>>(a, b, kAll), Shuffle<Alternate<true>>(a, b, kAll)));
  }
  if constexpr (N > 1) PoolRows<N / 2>(x, width, j, y);
}

void MaxPool2x2(const float* x, int64_t height, int64_t width, float* y) {
  for (int64_t o = 0; o < height / 2; ++o) PoolRows<kLanes>(x + 2 * o * width, width, 0, y + o * (width / 2));
}

double Spin(int64_t rounds) {
  using V = Lanes<kLanes>::Float;
  constexpr int kSums = 10;
  V sums[kSums], factor = All<kLanes>(0.5f), term = All<kLanes>(1.0f);
  Unroll<kSums>([&](int s) SLRC_INLINE { sums[s] = All<kLanes>(0.1f * s); });
  for (int64_t r = 0; r < rounds; ++r) Unroll<kSums>([&](int s) SLRC_INLINE { sums[s] = sums[s] * factor + term; });
  V all = sums[0];
  for (int s = 1; s < kSums; ++s) all += sums[s];
  volatile float used = all[0];
  return 2.0 * kSums * kLanes * static_cast<double>(rounds) + 0.0 * used;
}

// A last half costs half where a vector is executed in two halves, elsewhere no more than a whole one. A pixel more
// needs registers of its own.
template <int End, int Rows, int Vectors, int Most>
constexpr StripLoop Loop() {
  if constexpr (Vectors > Most) return nullptr;
  else if constexpr (End == kWhole) return RunStrip<Rows, Vectors - 1, kLanes, 0>;
  else if constexpr (End == kHalf && kLanes == 16) return RunStrip<Rows, Vectors - 1, kLanes / 2, 0>;
  else if constexpr (End == kPixelMore && kManyRegisters && Rows > 1) return RunStrip<Rows, Vectors - 1, kLanes, 1>;
  return nullptr;
}

// The features that the compiler may use here: their macros are then 1, not themselves.
#define SLRC_TEXT_OF(text) #text
#define SLRC_EXPANDED(macro) SLRC_TEXT_OF(macro)
#define SLRC_USED(name, macro, word, bit) | (SLRC_EXPANDED(__##macro##__)[0] == '1' ? 1u << kBitOf##macro : 0u)
constexpr uint32_t kCompiledFor = 0 SLRC_FEATURES(SLRC_USED);

#define SLRC_SIX(End, Rows, Most)                                                                    \
  {                                                                                                  \
    Loop<End, Rows, 1, Most>(), Loop<End, Rows, 2, Most>(), Loop<End, Rows, 3, Most>(),              \
        Loop<End, Rows, 4, Most>(), Loop<End, Rows, 5, Most>(), Loop<End, Rows, 6, Most>()           \
  }
#define SLRC_ROWS(End) {SLRC_SIX(End, 1, kVectors1), SLRC_SIX(End, 4, kVectors4), SLRC_SIX(End, 8, kVectors8)}

}  // namespace

extern const TileLoops SLRC_TILE_SET = {
    SLRC_TILE_NAME,
    kCompiledFor,
    kLanes,
    kMasks,
    {kVectors1, kVectors4, kVectors8},
    {SLRC_ROWS(kWhole), SLRC_ROWS(kHalf), SLRC_ROWS(kPixelMore)},
    {RunPixel<1>, RunPixel<4>, RunPixel<8>},
    Copy,
    CopyEachRow,
    Transpose,
    MaxPool2x2,
    Spin,
};

}  // namespace slrc
