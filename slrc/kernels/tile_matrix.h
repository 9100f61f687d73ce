// Strips by AMX, whose registers are matrices (README.md draws them). What the columns read of a run is brought together
// once for all rows. For tile_matrix.cpp alone.
#pragma once

#include "tile_strip.h"

namespace slrc {
namespace {

constexpr int kRegisterWords = kMatrixColumns * kLanes;
constexpr int64_t kRowBytes = 64;

// The shapes of the matrix registers, while it lives: without them they cannot be used, and with them a thread's state
// is large.
class MatrixShapes {
 public:
  MatrixShapes() {
    Shapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < kRegisters; ++i) {
      shapes.bytes[i] = kRowBytes;
      shapes.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }
  ~MatrixShapes() { asm volatile("tilerelease" : : : "memory"); }

 private:
  static constexpr int kRegisters = 8;
  struct Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
};

// Registers 0, 1 and 2 are the sums of as many vectors, 3 is values, 4, 5 and 6 are the vectors' pixels. (The compilers'
// functions want these numbers as constants of the preprocessor, too.)
SLRC_INLINE inline void LoadMatrixValues(const MatrixRow* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm3" : : "r"(from), "r"(kRowBytes) : "memory");
}
template <int V>
void ClearSums();
template <int V>
void MultiplyMatrix(const Word* pixels);
template <int V>
void StoreSums(Word* to);
#define SLRC_MATRIX(V, sums, pixel)                                                                                   \
  template <>                                                                                                         \
  SLRC_INLINE inline void ClearSums<V>() {                                                                            \
    asm volatile("tilezero %%" sums : : : "memory");                                                                  \
  }                                                                                                                   \
  template <>                                                                                                         \
  SLRC_INLINE inline void MultiplyMatrix<V>(const Word* pixels) {                                                     \
    asm volatile("tileloadd (%0,%1,1), %%" pixel : : "r"(pixels), "r"(kRowBytes) : "memory");                         \
    asm volatile("tdpbsud %%" pixel ", %%tmm3, %%" sums : : : "memory");                                              \
  }                                                                                                                   \
  template <>                                                                                                         \
  SLRC_INLINE inline void StoreSums<V>(Word * to) {                                                                   \
    asm volatile("tilestored %%" sums ", (%0,%1,1)" : : "r"(to), "r"(kRowBytes) : "memory");                          \
  }
SLRC_MATRIX(0, "tmm0", "tmm4")
SLRC_MATRIX(1, "tmm1", "tmm5")
SLRC_MATRIX(2, "tmm2", "tmm6")
#undef SLRC_MATRIX

template <int Whole, int Last, Reads Read>
SLRC_INLINE inline void GatherRun(const Strip& s, const Word* from, Word* to) {
  const MatrixWeight weight = *s.matrix;
  const TapLanes* taps = s.tap_lanes;
  for (int64_t k = 0; k < weight.columns; ++k) {
    if constexpr (Read == kSome)
      while (k >= weight.tap_ends[taps->end - 1]) ++taps;
    Word* const column = to + k / kMatrixColumns * (Whole + 1) * kRegisterWords + k % kMatrixColumns * kLanes;
    const Word* const x = from + weight.offsets[k];
    Unroll<Whole>([&](int v) SLRC_INLINE {
      Store<kLanes>(column + v * kRegisterWords, LoadColumn<kLanes, Read>(x, v, taps, s.padding));
    });
    Store<Last>(column + Whole * kRegisterWords, LoadColumn<Last, Read>(x, Whole, taps, s.padding));
  }
}

// Brings the columns of all runs side by side, as matrix registers take them. What is left of the last register of a
// run is multiplied by zeros.
template <int Whole, int Last>
SLRC_INLINE inline void Gather(const Strip& s, int64_t products) {
  for (int64_t run = 0; run < s.runs; ++run) {
    const Word* const from = s.x + run * s.x_step;
    Word* const to = s.gathered + run * products * (Whole + 1) * kRegisterWords;
    if (s.tap_lanes) GatherRun<Whole, Last, kSome>(s, from, to);
    else GatherRun<Whole, Last, kAll>(s, from, to);
  }
}

template <int Whole, int Last>
void RunMatrices(const Strip& strip) {
  constexpr int kVectors = Whole + 1;
  const Strip s = strip;  // a copy that no store can reach
  const int64_t products = ProductsOf(s.matrix->columns);
  const MatrixShapes shapes;
  Gather<Whole, Last>(s, products);
  alignas(64) Word sums[kVectors][kMatrixRows * kLanes];
  ForMaking(*s.results, [&](auto making) SLRC_INLINE {
    const Int8Results first = *s.results;
    const MatrixRow* of_rows = s.matrix->values;
    for (int64_t channel = 0; channel < s.channels; channel += kMatrixRows, of_rows += products * kMatrixRows) {
      Int8Results job = first;
      const Word* pixels = s.gathered;
      for (int64_t run = 0; run < s.runs; ++run) {
        ClearSums<0>();
        if constexpr (kVectors > 1) ClearSums<1>();
        if constexpr (kVectors > 2) ClearSums<2>();
        const MatrixRow* values = of_rows;
        for (int64_t k = 0; k < products; ++k, pixels += kVectors * kRegisterWords, values += kMatrixRows) {
          LoadMatrixValues(values);
          MultiplyMatrix<0>(pixels);
          if constexpr (kVectors > 1) MultiplyMatrix<1>(pixels + kRegisterWords);
          if constexpr (kVectors > 2) MultiplyMatrix<2>(pixels + 2 * kRegisterWords);
        }
        StoreSums<0>(sums[0]);
        if constexpr (kVectors > 1) StoreSums<1>(sums[1]);
        if constexpr (kVectors > 2) StoreSums<2>(sums[2]);
        Unroll<kMatrixRows>([&](int i) SLRC_INLINE {
          if (channel + i >= s.channels) return;
          const Word bias = s.bias[channel + i];
          typename Lanes<kLanes>::Float whole[Whole ? Whole : 1];
          Unroll<Whole>([&](int v) SLRC_INLINE {
            whole[v] = Add<kLanes>(Load<kLanes>(sums[v] + i * kLanes), Repeat<kLanes>(bias));
          });
          FinishInRegisters<making.kMaking, Whole, Last>(
              job, channel + i, whole, Add<Last>(Load<Last>(sums[Whole] + i * kLanes), Repeat<Last>(bias)));
        });
        job.y += s.y_step;
        if (job.residual) job.residual += s.y_step;
      }
    }
  });
}

}  // namespace
}  // namespace slrc
