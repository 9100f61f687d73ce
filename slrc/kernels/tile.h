// README.md says what the words mean and where to find what.
//
// The innermost loops: block rows, each on a few vectors of pixels at a time; copies of the input. Compiled once for
// each instruction set (tile.cpp).
//
// Nothing with external linkage may be inlined into those units: the linker would keep one copy of it, perhaps the
// one compiled for instructions that this processor lacks. So this header holds plain data only.
#pragma once

#include <stdint.h>

namespace slrc {

// A Word is four bytes that vectors hold side by side, one for each pixel: a float, or, in int8 layers, the bytes of
// four input channels, and int32 sums. What handles words without computing moves either.
using Word = float;

constexpr int kParts = 3;
constexpr int kRowSizes = 3;
constexpr int kTileRows[kRowSizes] = {1, 4, 8};
constexpr int kMaxVectors = 6;
constexpr int kMaxLanes = 16;
constexpr int kMaxTilePixels = kMaxVectors * kMaxLanes + 1;
constexpr int kMatrixRows = 16, kMatrixColumns = 16;  // of values that matrix registers multiply at a time

// How many products so many columns take.
static constexpr int64_t ProductsOf(int64_t columns) { return (columns + kMatrixColumns - 1) / kMatrixColumns; }

// What a row of a matrix register is loaded from, in a cache line of its own.
struct alignas(64) MatrixRow {
  Word words[kMatrixColumns];
};

// A weight for MatrixLoops: the columns that any of its rows has.
struct MatrixWeight {
  int64_t columns;          // 0: vectors multiply it
  const int32_t* offsets;   // (columns), as in Strip
  const int32_t* tap_ends;  // (taps), as in Strip
  const MatrixRow* values;  // (rows / kMatrixRows, products, kMatrixRows), zeros where a row has no such column
};

// X(name here, name in files). Those up to kRelu6 are so cheap that a tile applies them to its registers.
#define SLRC_ACTIVATIONS(X) \
  X(None, "none")           \
  X(Relu, "relu")           \
  X(LeakyRelu, "leakyrelu") \
  X(Relu6, "relu6")         \
  X(Silu, "silu")           \
  X(Gelu, "gelu")           \
  X(HardSwish, "hardswish")

#define SLRC_VALUE_OF(value, name) k##value,
enum Activation { SLRC_ACTIVATIONS(SLRC_VALUE_OF) kActivations };
#undef SLRC_VALUE_OF

static constexpr bool IsCheap(Activation activation) { return activation <= kRelu6; }

// A pixel that a tile computes beside its vectors (kPixelMore), apart from them:
// y[i * pitch] = activation(bias[i] + start[i * start_pitch] + sum over t of values[t, i] * x[offsets[t]]).
struct PixelMore {
  const int32_t* offsets;
  const float* x;
  const float* start;  // null if there is none; may be y
  int64_t start_pitch;
  float* y;
  int64_t pitch;
};

// Which pixels of a run are outputs, a bit for each lane of a vector, and how many are so before that vector.
struct Outputs {
  uint16_t kept[kMaxVectors + 1];
  int32_t at[kMaxVectors + 1];
};

// Some taps of the kernel, in the order of TapOrder: from the end of the TapLanes before these up to `end`. Of what
// their columns read of x for a run, the lanes of each vector that are read; the others are padding and not touched.
struct TapLanes {
  int32_t end;
  uint16_t read[kMaxVectors + 1];
};

// README.md draws it: one block row after the other on `runs` runs of pixels. Of the first run:
// y[i, p] = activation(bias[i] + start[i, p] + sum over t of values[t, i] * x[offsets[t] + p]),
// t being the surviving blocks begins[r] ... ends[r] - 1 of i's block row r.
struct Strip {
  const float* values;     // (surviving blocks, value_step): the rows of one stand together, see value_words
  const int32_t* offsets;  // (surviving blocks)
  const int32_t* begins;   // (block rows)
  const int32_t* ends;     // (block rows)
  int64_t block;
  int64_t value_step;
  int64_t channels;  // rows of y; the last block may stand out over them
  const float* x;
  const float* bias;   // null, or (block rows, block)
  const float* start;  // null, or (channels, start_pitch); may be y
  int64_t start_pitch;
  float* y;  // (channels, pitch)
  int64_t pitch;
  int64_t runs, x_step, y_step;  // from a run to the next one in x; in y and start
  int64_t ahead;                 // of more than one row: so far past what is read of x, it is prefetched; 0: it is not
  PixelMore more;
  // Null if all lanes of x are read; else (tap_lanes_count), and the columns of each block row are in the order of
  // taps.
  const TapLanes* tap_lanes;
  int64_t tap_lanes_count;
  const int32_t* tap_ends;  // (block rows, taps): up to where the surviving blocks of a tap stand
  int64_t taps;
  const Outputs* outputs;  // null if all are; else, of one run, start and y have them side by side (if `masks`)
  int64_t parts;  // 1, or kParts of each block row's columns, all alike, each of them x_step after the one before
  Activation activation;
  float slope;  // of kLeakyRelu
  Word padding;  // what lanes count as that are padding
  // Of int8 layers: what becomes of the sums of the first run, bytes, for all its pixels unless `masks`; null: y is.
  const struct Int8Results* results;
  // Of MatrixLoops, whose strips are of all rows: the weight, and room for what its columns read of the runs, (runs,
  // products, vectors, kMatrixColumns, lanes).
  const MatrixWeight* matrix;
  Word* gathered;
};

using StripLoop = void (*)(const Strip&);

// Rows of a copy, `from_step` and `to_step` apart. Of the first: to[to + i] = x[from + i * stride] for i < floats, and
// padding from there up to `written`.
struct CopyRun {
  int32_t from, to, floats, written;
  int32_t rows = 1, from_step = 0, to_step = 0;
};

// The same runs of every channel, in order and in whole vectors: a later one overwrites what an earlier one wrote past
// its end. The last channel's last run may be written past its end as well. Where every run is one row and only padding
// that comes first is written past a channel's end, some channels go `together`, one run of all of them after the
// other, and nothing is written past the last one.
struct CopyJob {
  const CopyRun* runs;
  int64_t run_count;
  const float* x;
  int64_t readable;  // floats from x on; some after the last channel spare a copy float by float
  int64_t stride;
  int64_t x_step, to_step;  // from a channel to the next one
  float* to;
  int64_t channels;
  bool together;
  Word padding;
};

using CopyLoop = void (*)(const CopyJob&);
// Copies (rows, floats), or transposes it to (floats, rows).
using MoveRows = void (*)(const float* from, int64_t from_pitch, int64_t rows, int64_t floats, float* to,
                          int64_t to_pitch);

// y (height / 2, width / 2) = the maxima of 2 x 2 windows of x (height, width), side by side.
using PlaneLoop = void (*)(const float* x, int64_t height, int64_t width, float* y);

// What becomes of the sums of an int8 layer (see SlrcInt8Blocks): some rows of `count` each, `sums_pitch` apart. Of a
// row all have one scale, or (`by_lane`) each its own.
struct Int8Results {
  const Word* sums;
  int64_t sums_pitch;
  const float* scale;
  bool by_lane;
  const uint8_t* residual;  // null if there is none
  uint8_t* y;               // null if y is float32
  float* y_float;
  int64_t pitch;  // of the rows of residual and y
  int64_t rows, count;
  float residual_scale, residual_zero_point, y_zero_point;
  float slope;
};

using ResultLoop = void (*)(const Int8Results&);
// Words of four rows of bytes each, `pitch` apart: byte k of word i is from[k * pitch + i], or `filling` where row k is
// past the last of `rows`; all are flipped (see TileLoops).
using InterleaveLoop = void (*)(const uint8_t* from, int64_t pitch, int64_t rows, int64_t count, uint8_t filling,
                                Word* to);

// Rows of a depthwise int8 layer's sums, of one channel, side by side: sums[r * width + i] is the bias and, of each of
// the window's words, its value times the four bytes of x from r * row_step + offset + i * stride on. Loops read up to
// 64 bytes for a vector, and write up to a vector past the last sum.
struct DepthwiseRows {
  const uint8_t* x;
  const int32_t* offsets;  // (words): in bytes
  const Word* values;      // (words, value_words)
  int64_t words;
  int64_t stride;  // up to kMostAlong
  int64_t row_step, rows, width;
  Word bias;
  Word* sums;
};

using DepthwiseLoop = void (*)(const DepthwiseRows&);
// The maxima of windows of some channels' bytes, without padding; `room` is for twice as much as is read of x.
struct PoolRows {
  const uint8_t* x;
  int64_t planes, plane, pitch;  // how many, from one to the next, from a row to the next
  uint8_t* y;
  int64_t y_plane;
  int64_t out_height, out_width;
  int64_t kernel[2], strides[2];
  uint8_t* room;
};

using PoolLoop = void (*)(const PoolRows&);
// Copies (rows, count) bytes.
using CopyBytes = void (*)(const uint8_t* from, int64_t from_pitch, int64_t rows, int64_t count, uint8_t* to,
                           int64_t to_pitch);

// What a run ends with: a whole vector, one half as wide, or a whole one and a pixel.
enum Ending { kWhole, kHalf, kPixelMore, kEndings };

// Loops of a processor whose registers are matrices, for strips that make results themselves: what the columns read is
// brought together once for all rows.
struct MatrixLoops {
  const char* name;
  uint32_t features;
  StripLoop strip[kEndings][3];  // [ending][vectors - 1]
};

// The loops of one instruction set, by the index of their rows in kTileRows.
struct TileLoops {
  const char* name;
  uint32_t features;  // that a processor needs for them, see processor.h
  int lanes;
  bool masks;                  // whether a strip may have `tap_lanes` and `outputs`
  int max_vectors[kRowSizes];  // of a run, in registers; 0 where there is no such loop
  StripLoop strip[kEndings][kRowSizes][kMaxVectors];  // [ending][rows][vectors - 1]; null where an ending gains nothing
  StripLoop pixel[kRowSizes];                         // runs of one pixel, the rows side by side in a vector
  CopyLoop copy;
  MoveRows copy_rows, transpose;
  PlaneLoop max_pool_2x2, upsample_bilinear_2x;
  double (*spin)(int64_t rounds);  // independent multiply-adds only; returns the operations done, two for each
  // Of int8 layers alone:
  ResultLoop results;
  InterleaveLoop interleave;
  DepthwiseLoop depthwise;
  CopyBytes copy_bytes;
  PoolLoop max_pool;
  int value_words;  // that a value takes: 1; or 2, its even bytes as 16 bits, and `block` later its odd ones
  uint8_t flip;  // what x's bytes are flipped by: 0x80 where they are multiplied as signed ones
  const MatrixLoops* matrix;  // null if there are none
};

// Those of one processor family are linked.
extern const TileLoops kAvx512, kAvx2, kNeon, kPortable;
extern const TileLoops kAvx512AmxInt8, kAvx512VnniInt8, kAvx512Int8, kAvx2VnniInt8, kAvx2Int8, kNeonI8mmInt8,
    kNeonDotInt8, kNeonInt8, kPortableInt8;
extern const MatrixLoops kAvx512Amx;

}  // namespace slrc
