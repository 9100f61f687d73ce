// One tile (README.md draws it): the sums of some rows and pixels, in registers. For tile.cpp alone.
#pragma once

#include "tile_results.h"

namespace slrc {
namespace {

// How many floats of the values are prefetched ahead: a page, since a processor's own prefetching stops at its end, and
// weights that were driven from the caches would be waited for at the beginning of each.
constexpr int kValuesAhead = 1024, kLine = 16;

// How a tile reads x: all, all and what the next tile reads ahead, or some lanes (see TapLanes).
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
  int64_t channel;          // of the strip's
  int64_t pixel;            // of the strip's results
};

// A tile's size, known to the compiler: rows (of one run) or runs (of one row), by `Whole` vectors, a last one of
// `Last` lanes and perhaps a pixel more.
template <int Rows, int Runs, int Whole, int Last, int Pixel>
struct TileSize {
  static_assert(Rows == 1 ? !Pixel : Runs == 1);
  static constexpr int kRows = Rows, kRuns = Runs, kWhole = Whole, kLast = Last;
  static constexpr bool kHasMore = Pixel > 0;
  static constexpr bool kMayLeaveGaps = kMasks && Rows > 1;
  static constexpr int kSums = Rows * Runs;
  static constexpr int kPixels = Whole * kLanes + Last;  // without the one more
  static constexpr int kLines = (kPixels + kLine - 1) / kLine;
  static constexpr int kSide = Rows < kLanes ? Rows : kLanes;  // rows side by side in the sums of a pixel more
  static constexpr int kSides = Rows / kSide;

  using V = typename Lanes<kLanes>::Float;
  using L = typename Lanes<Last>::Float;
  using Side = typename Lanes<kSide>::Float;
};

// The sums of a tile, in registers: everything that takes them is inlined and unrolled. Of a pixel more the lanes are
// the rows: a multiply-add for each column, not for each column and row.
template <class Size>
struct Sums {
  typename Size::V whole[Size::kSums][Size::kWhole ? Size::kWhole : 1];
  typename Size::L last[Size::kSums];
  typename Size::Side more[Size::kSides];
};

// From a row (of several rows) or a run (of one row) of a tile to the next one.
template <class Size>
SLRC_INLINE inline int64_t StartStep(const Tile& tile) {
  return Size::kRows == 1 ? tile.y_step : tile.start_pitch;
}
template <class Size>
SLRC_INLINE inline int64_t ResultStep(const Tile& tile) {
  return Size::kRows == 1 ? tile.y_step : tile.pitch;
}

template <class Size>
SLRC_INLINE inline void BeginWithBias(const Tile& tile, Sums<Size>& sums) {
  if constexpr (Size::kHasMore)
    Unroll<Size::kSides>([&](int q) SLRC_INLINE { sums.more[q] = Load<Size::kSide>(tile.bias + q * Size::kSide); });
  Unroll<Size::kSums>([&](int s) SLRC_INLINE {
    const float bias = tile.bias[Size::kRows == 1 ? 0 : s];
    Unroll<Size::kWhole>([&](int v) SLRC_INLINE { sums.whole[s][v] = Repeat<kLanes>(bias); });
    sums.last[s] = Repeat<Size::kLast>(bias);
  });
}

// What is added at the end is on its way while columns are multiplied.
template <class Size>
SLRC_INLINE inline void PrefetchStart(const Tile& tile) {
  if (!tile.start) return;
  Unroll<Size::kSums>([&](int s) SLRC_INLINE {
    const float* start = tile.start + s * StartStep<Size>(tile);
    Unroll<Size::kLines>([&](int line) SLRC_INLINE { __builtin_prefetch(start + line * kLine); });
    __builtin_prefetch(start + Size::kPixels - 1);
  });
}

// `outputs` as in Strip: of the pixels that are none, nothing is there to add.
template <class Size>
SLRC_INLINE inline void AddStart(const Tile& tile, const Outputs* outputs, Sums<Size>& sums) {
  if constexpr (Size::kMayLeaveGaps)
    if (tile.start && outputs)
      Unroll<Size::kSums>([&](int s) SLRC_INLINE {
        const float* start = tile.start + s * tile.start_pitch;
        Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
          sums.whole[s][v] =
              Add<kLanes>(sums.whole[s][v], LoadKept<kLanes>(start + outputs->at[v], outputs->kept[v]));
        });
        sums.last[s] = Add<Size::kLast>(
            sums.last[s], LoadKept<Size::kLast>(start + outputs->at[Size::kWhole], outputs->kept[Size::kWhole]));
      });
  if (tile.start && !outputs)
    Unroll<Size::kSums>([&](int s) SLRC_INLINE {
      const float* start = tile.start + s * StartStep<Size>(tile);
      Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
        sums.whole[s][v] = Add<kLanes>(sums.whole[s][v], Load<kLanes>(start + v * kLanes));
      });
      sums.last[s] = Add<Size::kLast>(sums.last[s], Load<Size::kLast>(start + Size::kWhole * kLanes));
    });
  if (Size::kHasMore && tile.more.start)
    Unroll<Size::kSides>([&](int q) SLRC_INLINE {
      typename Size::Side start = {};
      Unroll<Size::kSide>([&](int i) SLRC_INLINE {
        start[i] = tile.more.start[(q * Size::kSide + i) * tile.more.start_pitch];
      });
      sums.more[q] = Add<Size::kSide>(sums.more[q], start);
    });
}

// Of one row: a value is loaded once for all runs, and a vector of x once for all of the `Parts` parts of the columns
// (see Strip).
template <int Parts, class Size>
SLRC_INLINE inline void MultiplyRuns(const Tile& tile, int64_t stride, Sums<Size>& sums) {
  const float* values = tile.values;
  const int64_t part = (tile.end - tile.offsets) / Parts;
  for (int64_t t = 0; t < part; ++t, values += stride) {
    const float* x = tile.x + tile.offsets[t];
    float value[Parts];
    Unroll<Parts>([&](int k) SLRC_INLINE { value[k] = values[k * part * stride]; });
    Unroll<Size::kRuns + Parts - 1>([&](int r) SLRC_INLINE {
      typename Size::V column[Size::kWhole ? Size::kWhole : 1];
      Unroll<Size::kWhole>([&](int v) SLRC_INLINE { column[v] = InRegister(Load<kLanes>(x + v * kLanes)); });
      const typename Size::L last = InRegister(Load<Size::kLast>(x + Size::kWhole * kLanes));
      Unroll<Parts>([&](int k) SLRC_INLINE {
        const int s = r - k;
        if (s < 0 || s >= Size::kRuns) return;
        Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
          sums.whole[s][v] = MultiplyAdd<kLanes>(sums.whole[s][v], column[v], Repeat<kLanes>(value[k]));
        });
        sums.last[s] = MultiplyAdd<Size::kLast>(sums.last[s], last, Repeat<Size::kLast>(value[k]));
      });
      x += tile.x_step;
    });
  }
}

// Of several rows: the v-th vector of a column, or the lanes of it that its taps read.
template <int N, Reads Read>
SLRC_INLINE inline typename Lanes<N>::Float LoadColumn(const Word* x, int v, const TapLanes* taps,
                                                             Word padding) {
  if constexpr (Read == kSome) return LoadLanes<N>(x + v * kLanes, taps->read[v], padding);
  else return Load<N>(x + v * kLanes);
}

#if defined(SLRC_TILE_MATMUL)

// Of several rows, their columns two by two (see tile_arithmetic.h); returns past the last pair of offsets.
template <Reads Read, class Size>
SLRC_INLINE inline const int32_t* MultiplyPairs(const Tile& tile, const Strip& strip, Sums<Size>& sums) {
  static_assert(Size::kLast == 4 && !Size::kHasMore);
  constexpr int kVectors = Size::kWhole + 1;
  const int64_t stride = strip.value_step, ahead = strip.ahead;
  const auto turn = [&]() SLRC_INLINE {
    Unroll<Size::kRows / 2>([&](int q) SLRC_INLINE {
      Unroll<Size::kWhole>([&](int v) SLRC_INLINE { TurnSums(&sums.whole[2 * q][v], &sums.whole[2 * q + 1][v]); });
      TurnSums(&sums.last[2 * q], &sums.last[2 * q + 1]);
    });
  };
  const float* values = tile.values;
  const int32_t* offset = tile.offsets;
  turn();
  for (; tile.end - offset >= 2; offset += 2, values += 2 * stride) {
    const float *x = tile.x + offset[0], *next = tile.x + offset[1];
    __builtin_prefetch(values + kValuesAhead);
    __builtin_prefetch(values + kValuesAhead + stride);
    if constexpr (Read == kAhead)
      Unroll<Size::kLines>([&](int line) SLRC_INLINE {
        __builtin_prefetch(x + ahead + line * kLine);
        __builtin_prefetch(next + ahead + line * kLine);
      });
    Four value[Size::kRows / 2];
    Unroll<Size::kRows / 2>([&](int q) SLRC_INLINE {
      value[q] = InTurn(Load<2>(values + 2 * q), Load<2>(values + stride + 2 * q));
    });
    Unroll<kVectors>([&](int v) SLRC_INLINE {
      const Four one = Load<4>(x + 4 * v), other = Load<4>(next + 4 * v);
      const Four first = FirstInTurn(one, other), second = SecondInTurn(one, other);
      Unroll<Size::kRows / 2>([&](int q) SLRC_INLINE {
        Four& of_first = v < Size::kWhole ? sums.whole[2 * q][v] : sums.last[2 * q];
        Four& of_second = v < Size::kWhole ? sums.whole[2 * q + 1][v] : sums.last[2 * q + 1];
        of_first = MultiplyAddTwo(of_first, value[q], first);
        of_second = MultiplyAddTwo(of_second, value[q], second);
      });
    });
  }
  turn();
  return offset;
}

#else

template <Reads Read, class Size>
const int32_t* MultiplyPairs(const Tile&, const Strip&, Sums<Size>&);

#endif

// Of several rows: a surviving column loads each vector of x once for all of them.
template <Reads Read, class Size>
SLRC_INLINE inline void MultiplyRows(const Tile& tile, const Strip& strip, Sums<Size>& sums) {
  const int64_t stride = strip.value_step, ahead = strip.ahead;
  const Word padding = strip.padding;
  const float* values = tile.values;
  const int32_t *offset = tile.offsets, *more_offset = tile.more.offsets;
  if constexpr (kByTwo) {
    offset = MultiplyPairs<Read>(tile, strip, sums);
    values += (offset - tile.offsets) * stride;
  }
  const int64_t count = Read == kSome ? strip.tap_lanes_count : 1;
  for (int64_t k = 0; k < count; ++k) {
    const TapLanes* const taps = Read == kSome ? strip.tap_lanes + k : nullptr;
    const int32_t* const end = Read == kSome ? strip.offsets + tile.tap_ends[taps->end - 1] : tile.end;
    for (; offset != end; ++offset, ++more_offset, values += stride) {
      const float* x = tile.x + *offset;
      __builtin_prefetch(values + kValuesAhead);
      if constexpr (Read == kAhead)
        Unroll<Size::kLines>([&](int line) SLRC_INLINE { __builtin_prefetch(x + ahead + line * kLine); });
      Unroll<kPasses>([&](int pass) SLRC_INLINE {
        typename Size::V column[Size::kWhole ? Size::kWhole : 1];
        Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
          column[v] = BytesOf<kLanes>(LoadColumn<kLanes, Read>(x, v, taps, padding), pass);
        });
        const typename Size::L last =
            BytesOf<Size::kLast>(LoadColumn<Size::kLast, Read>(x, Size::kWhole, taps, padding), pass);
        SLRC_LOAD_VALUES(Size::kRows, values);
        Unroll<Size::kRows>([&](int i) SLRC_INLINE {
          const Word value = SLRC_VALUE(pass * strip.block + i);
          Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
            sums.whole[i][v] = MultiplyAdd<kLanes>(sums.whole[i][v], column[v], Repeat<kLanes>(value));
          });
          sums.last[i] = MultiplyAdd<Size::kLast>(sums.last[i], last, Repeat<Size::kLast>(value));
        });
      });
      if constexpr (Size::kHasMore) {
        const Word pixel = Read != kSome || taps->read[Size::kWhole + 1] ? tile.more.x[*more_offset] : padding;
        Unroll<Size::kSides>([&](int q) SLRC_INLINE {
          sums.more[q] = MultiplyAdd<Size::kSide>(sums.more[q], Repeat<Size::kSide>(pixel),
                                                  Load<Size::kSide>(values + q * Size::kSide));
        });
      }
    }
  }
}

template <class Size, class Function>
SLRC_INLINE inline void Apply(const Function& function, Sums<Size>& sums) {
  Unroll<Size::kSums>([&](int s) SLRC_INLINE {
    Unroll<Size::kWhole>([&](int v) SLRC_INLINE { sums.whole[s][v] = function(sums.whole[s][v]); });
    sums.last[s] = function(sums.last[s]);
  });
  if constexpr (Size::kHasMore)
    Unroll<Size::kSides>([&](int q) SLRC_INLINE { sums.more[q] = function(sums.more[q]); });
}

template <class Size>
SLRC_INLINE inline void ActivateCheaply(Activation activation, float slope, Sums<Size>& sums) {
  if (activation == kRelu || activation == kRelu6)
    Apply([](auto v) SLRC_INLINE { return AtLeast<sizeof v / sizeof(float)>(v, 0.0f); }, sums);
  if (activation == kRelu6) Apply([](auto v) SLRC_INLINE { return AtMost<sizeof v / sizeof(float)>(v, 6.0f); }, sums);
  if (activation == kLeakyRelu) Apply([slope](auto v) SLRC_INLINE { return v < 0.0f ? v * slope : v; }, sums);
}

template <class Size>
SLRC_INLINE inline void StoreSums(const Tile& tile, const Outputs* outputs, const Sums<Size>& sums) {
  if constexpr (Size::kMayLeaveGaps)
    if (outputs)
      Unroll<Size::kSums>([&](int s) SLRC_INLINE {
        float* y = tile.y + s * ResultStep<Size>(tile);
        Unroll<Size::kWhole>([&](int v) SLRC_INLINE {
          StoreKept<kLanes>(y + outputs->at[v], sums.whole[s][v], outputs->kept[v]);
        });
        StoreKept<Size::kLast>(y + outputs->at[Size::kWhole], sums.last[s], outputs->kept[Size::kWhole]);
      });
  if (!outputs)
    Unroll<Size::kSums>([&](int s) SLRC_INLINE {
      float* y = tile.y + s * ResultStep<Size>(tile);
      Unroll<Size::kWhole>([&](int v) SLRC_INLINE { Store<kLanes>(y + v * kLanes, sums.whole[s][v]); });
      Store<Size::kLast>(y + Size::kWhole * kLanes, sums.last[s]);
    });
}

// An activation that is not cheap: a loop over what has been stored, which is small where the sums in registers are
// not.
template <class Size>
SLRC_INLINE inline void ActivateStored(const Tile& tile, Activation activation, float slope) {
  for (int s = 0; s < Size::kSums; ++s)
    for (int p = 0; p < Size::kPixels; p += Size::kLast) {
      float* y = tile.y + s * ResultStep<Size>(tile) + p;
      Store<Size::kLast>(y, Activate<Size::kLast>(Load<Size::kLast>(y), activation, slope));
    }
}

// Computes one tile. `Parts` is for tiles of one row, `Read` for those of several.
template <class Size, int Parts, Reads Read>
SLRC_INLINE inline void RunTile(const Tile& tile, const Strip& strip) {
  static_assert(Size::kRows == 1 ? Read == kAll : Parts == 1);
  const Activation activation = strip.activation;
  const float slope = strip.slope;
  const Outputs* const outputs = Size::kMayLeaveGaps ? strip.outputs : nullptr;
  Sums<Size> sums;
  BeginWithBias(tile, sums);
  PrefetchStart<Size>(tile);
  if constexpr (Size::kRows == 1) MultiplyRuns<Parts>(tile, strip.value_step, sums);
  else MultiplyRows<Read>(tile, strip, sums);
  AddStart(tile, outputs, sums);
  if constexpr (kFuses && Size::kRows > 1)
    if (strip.results) {
      Int8Results job = *strip.results;  // a copy that no store can reach
      job.y += tile.pixel;
      if (job.residual) job.residual += tile.pixel;
      ForMaking(job, [&](auto making) SLRC_INLINE {
        Unroll<Size::kRows>([&](int i) SLRC_INLINE {
          if (i < tile.rows)
            FinishInRegisters<making.kMaking, Size::kWhole, Size::kLast>(job, tile.channel + i, sums.whole[i],
                                                                         sums.last[i]);
        });
      });
      return;
    }
  ActivateCheaply(activation, slope, sums);
  StoreSums(tile, outputs, sums);
  const bool has_more = Size::kHasMore && (!outputs || outputs->kept[Size::kWhole + 1]);
  if (!IsCheap(activation)) {
    if constexpr (Size::kHasMore)
      Unroll<Size::kSides>([&](int q) SLRC_INLINE {
        sums.more[q] = Activate<Size::kSide>(sums.more[q], activation, slope);
      });
    ActivateStored<Size>(tile, activation, slope);
  }
  if constexpr (Size::kHasMore)
    if (has_more)
      Unroll<Size::kSums>([&](int s) SLRC_INLINE {
        tile.more.y[s * tile.more.pitch] = sums.more[s / Size::kSide][s % Size::kSide];
      });
}

}  // namespace
}  // namespace slrc
