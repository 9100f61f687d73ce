// The loops of one instruction set, see tile.h. SLRC_TILE_SET names the set that this compilation defines; the
// compiler's flags choose the instructions.
#include "tile.h"

#include "processor.h"
#include "tile_copy.h"
#if defined(SLRC_TILE_INT8)
#include "tile_depthwise.h"
#include "tile_int8.h"
#include "tile_pool.h"
#endif
#include "tile_move.h"
#include "tile_set.h"
#include "tile_strip.h"

namespace slrc {
namespace {

#if defined(SLRC_TILE_INT8)
// How many products the instruction that multiplies most adds to each lane. (What is multiplied differs each time, or
// the compiler would multiply once.)
#if defined(SLRC_TILE_MATMUL)
constexpr int kMostProducts = 8;
SLRC_INLINE inline Four MostMultiplyAdds(Four sum, Four value) { return MultiplyAddTwo(sum, sum, value); }
#else
constexpr int kMostProducts = 4 / kPasses;
template <class V>
SLRC_INLINE inline V MostMultiplyAdds(V sum, V value) {
  sum = MultiplyAdd<kLanes>(sum, sum, value);
#if defined(SLRC_IN_PAIRS)
  asm volatile("" : "+v"(sum));  // one after the other, or the products alone would fill the registers
#endif
  return sum;
}
#endif

double Spin(int64_t rounds) {
  using V = Lanes<kLanes>::Float;
  constexpr int kSums = 10;
  V sums[kSums];
  const V value = Repeat<kLanes>(2.5f);
  Unroll<kSums>([&](int s) SLRC_INLINE { sums[s] = Repeat<kLanes>(0.1f * s); });
  for (int64_t r = 0; r < rounds; ++r)
    Unroll<kSums>([&](int s) SLRC_INLINE { sums[s] = MostMultiplyAdds(sums[s], value); });
  V all = sums[0];
  Unroll<kSums - 1>([&](int s) SLRC_INLINE { all = Add<kLanes>(all, sums[s + 1]); });
  volatile float used = all[0];
  (void)used;
  return 2.0 * kMostProducts * kSums * kLanes * static_cast<double>(rounds);
}
#else
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
#endif

#if defined(SLRC_TILE_INT8)
constexpr bool kHasPixelMore = false;  // their sums would not be with the others
#else
constexpr bool kHasPixelMore = true;
#endif

// A last half costs half where a vector is executed in two halves, elsewhere no more than a whole one. A pixel more
// needs registers of its own.
template <int End, int Rows, int Vectors, int Most>
constexpr StripLoop Loop() {
  if constexpr (Vectors > Most) return nullptr;
  else if constexpr (End == kWhole) return RunStrip<Rows, Vectors - 1, kLanes, 0>;
  else if constexpr (End == kHalf && kLanes == 16) return RunStrip<Rows, Vectors - 1, kLanes / 2, 0>;
  else if constexpr (End == kPixelMore && kManyRegisters && Rows > 1 && kHasPixelMore) return RunStrip<Rows, Vectors - 1, kLanes, 1>;
  return nullptr;
}

// Of one row.
template <int Rows = 1>
constexpr StripLoop PixelLoop() {
  if constexpr (kVectors1 > 0) return RunPixel<Rows>;
  return nullptr;
}

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
    {PixelLoop(), RunPixel<4>, RunPixel<8>},
    Copy,
    CopyEachRow,
    Transpose,
    MaxPool2x2,
    UpsampleBilinear2x,
    Spin,
#if defined(SLRC_TILE_INT8)
    MakeResults,
    Interleave,
    Depthwise,
    CopyRowsOfBytes,
    MaxPoolRows,
    kPasses,
    kFlip,
#else
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    1,
    0,
#endif
    nullptr,
};

}  // namespace slrc
