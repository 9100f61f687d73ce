// The innermost loops: one block row on a few vectors of pixels. Compiled once for each instruction set (tile.cpp).
//
// Nothing with external linkage may be inlined into those units: the linker would keep one copy of it, perhaps the
// one compiled for instructions that this processor lacks. So this header holds plain data only.
#pragma once

#include <stdint.h>

namespace slrc {

enum Activation { kNone, kRelu, kRelu6, kSilu, kGelu, kHardSwish };

// y[i, p] = activation(bias[i] + sum over t of values[t, i] * x[offsets[t] + p] + residual[i, p]),  i < rows.
struct Tile {
  const float* values;     // (count, stride): the rows of one surviving column stand together
  const int32_t* offsets;  // (count)
  int64_t count;
  int64_t stride;
  const float* x;
  const float* bias;      // as many as the loop has rows
  const float* residual;  // null, or laid out as y
  float* y;               // (rows, pitch)
  int64_t pitch;
  int rows;  // how many of the loop's rows are stored: the last block may stand out over the channels
  Activation activation;
};

using TileLoop = void (*)(const Tile&);

constexpr int kMaxVectors = 6;
constexpr int kMaxLanes = 16;
constexpr int kMaxTilePixels = kMaxVectors * kMaxLanes;

// The loops of one instruction set. Index 0 is for 4 rows, 1 for 8.
struct TileLoops {
  const char* name;
  int lanes;
  int max_vectors[2];               // vectors of pixels that the registers hold; 0 where there is no such loop
  TileLoop tile[2][kMaxVectors];    // [rows][vectors - 1]
  TileLoop halved[2][kMaxVectors];  // the same, the last vector half as wide; null where that gains nothing
  TileLoop pixel[2];                // one pixel, the rows side by side in a vector
  double (*spin)(int64_t rounds);   // independent multiply-adds only; returns the floating-point operations done
};

extern const TileLoops kPortable;
#if defined(__x86_64__)
extern const TileLoops kAvx2;
extern const TileLoops kAvx512;
#elif defined(__aarch64__)
extern const TileLoops kNeon;
#endif

}  // namespace slrc
