// Strips: block rows on some runs of pixels, tile by tile (README.md draws them). For tile.cpp alone.
#pragma once

#include "tile_sums.h"

namespace slrc {
namespace {

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
      Tile tile = {s.values + begin * s.value_step + (channel - first),
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
                   s.tap_ends ? s.tap_ends + r * s.taps : nullptr,
                   channel,
                   0};
      tile.more.offsets += begin;
      tile.more.y += channel * s.more.pitch;
      if (tile.more.start) tile.more.start += channel * s.more.start_pitch;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t runs = few + (t < more);
        run(tile, runs);
        tile.x += runs * s.x_step;
        tile.y += runs * s.y_step;
        tile.pixel += runs * s.y_step;
        if (tile.start) tile.start += runs * s.y_step;
        tile.more.x += runs * s.x_step;
        tile.more.y += runs * s.y_step;
        if (tile.more.start) tile.more.start += runs * s.y_step;
      }
    }
  }
}

// A tile of `runs` runs, up to `Most`.
template <int Rows, int Most, int Whole, int Last, int Pixel>
SLRC_INLINE inline void RunTiles(const Tile& tile, int64_t runs, const Strip& s) {
  using Size = TileSize<Rows, Most, Whole, Last, Pixel>;
  if constexpr (Most > 1) {
    if (runs < Most) return RunTiles<Rows, Most - 1, Whole, Last, Pixel>(tile, runs, s);
    if (s.parts == kParts) return RunTile<Size, kParts, kAll>(tile, s);
  }
#if !defined(__SANITIZE_ADDRESS__)  // a prefetch is not checked
  if constexpr (Rows > 1 && kManyRegisters)
    if (s.ahead) return RunTile<Size, 1, kAhead>(tile, s);
#endif
  if constexpr (Rows > 1 && kMasks)
    if (s.tap_lanes) return RunTile<Size, 1, kSome>(tile, s);
  RunTile<Size, 1, kAll>(tile, s);
}

// Memory for a tile of fewer rows than the loops compute: it is computed whole, and its own rows are copied out.
template <int Rows, int Pixels, int Pixel>
struct Aside {
  // Returns the tile that is to be computed, and fetches what its sums start from.
  Tile Begin(const Tile& tile, const Outputs* outputs) {
    for (int i = 0; i < tile.rows; ++i) {
      for (int p = 0, at = 0; tile.start && p < Pixels; ++p)
        sums[i * Pixels + p] = IsOutput(outputs, p) ? tile.start[i * tile.start_pitch + at++] : 0.0f;
      if (Pixel && tile.more.start) more[i] = tile.more.start[i * tile.more.start_pitch];
    }
    Tile whole = tile;
    if (tile.start) whole.start = sums;
    if (tile.more.start) whole.more.start = more;
    whole.y = sums;
    whole.start_pitch = whole.pitch = Pixels;
    whole.more.y = more;
    whole.more.start_pitch = whole.more.pitch = 1;
    return whole;
  }

  void End(const Tile& tile, const Outputs* outputs) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int p = 0, at = 0; p < Pixels; ++p)
        if (IsOutput(outputs, p)) tile.y[i * tile.pitch + at++] = sums[i * Pixels + p];
      if (Pixel && IsOutput(outputs, Pixels)) tile.more.y[i * tile.more.pitch] = more[i];
    }
  }

 private:
  static bool IsOutput(const Outputs* outputs, int p) {
    return !outputs || outputs->kept[p / kLanes] >> p % kLanes & 1;
  }

  alignas(64) float sums[Rows * Pixels] = {};
  float more[Rows] = {};
};

template <int Rows, int Whole, int Last, int Pixel>
void RunStrip(const Strip& strip) {
  const Strip s = strip;  // a copy that no store can reach
  constexpr int kRuns = RunsOf(Rows, Whole + 1);
  ForTiles<Rows, kRuns>(s, [&](const Tile& tile, int64_t runs) SLRC_INLINE {
    if (tile.rows == Rows || (kFuses && s.results)) return RunTiles<Rows, kRuns, Whole, Last, Pixel>(tile, runs, s);
    Aside<Rows, Whole * kLanes + Last, Pixel> aside;
    Strip plain = s;
    plain.outputs = nullptr;
    RunTiles<Rows, kRuns, Whole, Last, Pixel>(aside.Begin(tile, s.outputs), runs, plain);
    aside.End(tile, s.outputs);
  });
}

// One pixel: the lanes are the rows, in vectors of a register. Four sums, since one would wait for itself at each step.
template <int Rows>
void RunPixel(const Strip& s) {
  constexpr int kWide = Rows < kLanes ? Rows : kLanes, kVectors = Rows / kWide;
  using V = typename Lanes<kWide>::Float;
  ForTiles<Rows, 1>(s, [&](const Tile& tile, int64_t) {
    V sums[4][kVectors] = {};
    Unroll<kVectors>([&](int v) SLRC_INLINE { sums[0][v] = Load<kWide>(tile.bias + v * kWide); });
    const int64_t count = tile.end - tile.offsets;
    const auto add_column = [&](V* sum, int64_t t) SLRC_INLINE {
      const V pixel = Repeat<kWide>(tile.x[tile.offsets[t]]);
      Unroll<kPasses>([&](int pass) SLRC_INLINE {
        const float* values = tile.values + t * s.value_step + pass * s.block;
        const V bytes = BytesOf<kWide>(pixel, pass);
        Unroll<kVectors>([&](int v) SLRC_INLINE {
          sum[v] = MultiplyAdd<kWide>(sum[v], bytes, Load<kWide>(values + v * kWide));
        });
      });
    };
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
      const float* values = tile.values + t * s.value_step;
      for (int64_t line = 0; line < 4 * s.value_step; line += kLine) __builtin_prefetch(values + kValuesAhead + line);
      Unroll<4>([&](int k) SLRC_INLINE { add_column(sums[k], t + k); });
    }
    for (; t < count; ++t) add_column(sums[0], t);
    Unroll<kVectors>([&](int v) SLRC_INLINE {
      V sum = Add<kWide>(Add<kWide>(sums[0][v], sums[1][v]), Add<kWide>(sums[2][v], sums[3][v]));
      const int rows = static_cast<int>(tile.rows) - v * kWide < kWide ? static_cast<int>(tile.rows) - v * kWide : kWide;
      if (tile.start) {
        const float* from = tile.start + v * kWide * tile.start_pitch;
        V start = {};
        for (int i = 0; i < rows; ++i) start[i] = from[i * tile.start_pitch];
        sum = Add<kWide>(sum, start);
      }
      sum = Activate<kWide>(sum, s.activation, s.slope);
      for (int i = 0; i < rows; ++i) tile.y[(v * kWide + i) * tile.pitch] = sum[i];
    });
  });
}

}  // namespace
}  // namespace slrc
