// See tile.h. SLRC_TILE_SET names the set that this compilation defines; the compiler's flags choose the instructions.
#include "tile.h"

namespace slrc {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors4 = 6, kVectors8 = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors4 = 3, kVectors8 = 0;
#elif defined(SLRC_TILE_NEON)
constexpr int kLanes = 4, kVectors4 = 6, kVectors8 = 3;
#else
constexpr int kLanes = 4, kVectors4 = 3, kVectors8 = 0;
#endif

// GCC's and Clang's vector types: arithmetic and comparison act lane by lane. The "loose" ones may stand anywhere.
template <int N>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * N)));
  typedef int32_t Int __attribute__((vector_size(4 * N)));
  typedef float Loose __attribute__((vector_size(4 * N), aligned(4), may_alias));
};

template <int N>
inline typename Lanes<N>::Float Load(const float* p) {
  return *reinterpret_cast<const typename Lanes<N>::Loose*>(p);
}

template <int N>
inline void Store(float* p, typename Lanes<N>::Float v) {
  *reinterpret_cast<typename Lanes<N>::Loose*>(p) = v;
}

template <int N>
inline typename Lanes<N>::Float All(float v) {
  return v - typename Lanes<N>::Float{};
}

// Both keep a NaN in v.
template <int N, typename V = typename Lanes<N>::Float>
inline V AtLeast(V v, float bound) {
  return All<N>(bound) > v ? All<N>(bound) : v;
}

template <int N, typename V = typename Lanes<N>::Float>
inline V AtMost(V v, float bound) {
  return All<N>(bound) < v ? All<N>(bound) : v;
}

// Horner's rule, highest power first.
template <int N, int Count, typename V = typename Lanes<N>::Float>
inline V Polynomial(V v, const float (&coefficients)[Count]) {
  V sum = All<N>(coefficients[0]);
  for (int i = 1; i < Count; ++i) sum = sum * v + coefficients[i];
  return sum;
}

// e^v = 2^n e^r with |r| <= ln(2) / 2; relative error below 2e-7.
template <int N, typename V = typename Lanes<N>::Float>
inline V Exp(V v) {
  using I = typename Lanes<N>::Int;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  v = AtMost<N>(AtLeast<N>(v, -87.0f), 88.0f);
  V shifted = v * 1.44269504f + round;
  V n = shifted - round;
  V r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = Polynomial<N>(r, {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f});
  return reinterpret_cast<V>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
}

// x Phi(x), by Abramowitz and Stegun 7.1.26 for erfc(|x| / sqrt 2): absolute error of erfc below 2e-7.
template <int N, typename V = typename Lanes<N>::Float>
inline V Gelu(V v) {
  V z = (v < 0.0f ? -v : v) * 0.70710678f;
  V t = 1.0f / (1.0f + 0.3275911f * z);
  V p = Polynomial<N>(t, {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f});
  V tail = 0.5f * p * Exp<N>(-z * z);
  return v * (v < 0.0f ? tail : 1.0f - tail);
}

template <int N, typename V = typename Lanes<N>::Float>
inline V Activate(V v, Activation activation) {
  switch (activation) {
    case kRelu:
      return AtLeast<N>(v, 0.0f);
    case kRelu6:
      return AtMost<N>(AtLeast<N>(v, 0.0f), 6.0f);
    case kSilu:
      return v / (1.0f + Exp<N>(-v));
    case kGelu:
      return Gelu<N>(v);
    case kHardSwish:
      return v * AtMost<N>(AtLeast<N>(v * (1.0f / 6) + 0.5f, 0.0f), 1.0f);
    default:
      return v;
  }
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

// Calls body(0), ..., body(Count - 1), written out early enough for the compiler to keep arrays in registers.
template <int Count, class Body>
SLRC_INLINE inline void Unroll(const Body& body) {
  if constexpr (Count > 0) {
    Unroll<Count - 1>(body);
    body(Count - 1);
  }
}

// Adds the residual, activates and stores one vector of the output.
template <int N>
SLRC_INLINE inline void Finish(const Tile& tile, int row, int pixel, typename Lanes<N>::Float sum) {
  const int64_t at = row * tile.pitch + pixel;
  if (tile.residual) sum += Load<N>(tile.residual + at);
  if (tile.activation == kRelu) sum = AtLeast<N>(sum, 0.0f);
  Store<N>(tile.y + at, sum);
}

// Rows x (Whole vectors + one of Last lanes) accumulators in registers; a surviving column loads each vector of x once
// for all rows.
template <int Rows, int Whole, int Last>
void RunTile(const Tile& tile) {
  using V = typename Lanes<kLanes>::Float;
  using L = typename Lanes<Last>::Float;
  V sums[Rows][Whole ? Whole : 1];
  L lasts[Rows];
  Unroll<Rows>([&](int i) SLRC_INLINE {
    Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] = All<kLanes>(tile.bias[i]); });
    lasts[i] = All<Last>(tile.bias[i]);
  });

  const float* values = tile.values;
  for (int64_t t = 0; t < tile.count; ++t, values += tile.stride) {
    const float* x = tile.x + tile.offsets[t];
    V column[Whole ? Whole : 1];
    Unroll<Whole>([&](int v) SLRC_INLINE { column[v] = Load<kLanes>(x + v * kLanes); });
    const L last = Load<Last>(x + Whole * kLanes);
    SLRC_LOAD_VALUES(Rows, values);
    Unroll<Rows>([&](int i) SLRC_INLINE {
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] += column[v] * SLRC_VALUE(i); });
      lasts[i] += last * SLRC_VALUE(i);
    });
  }

  Unroll<Rows>([&](int i) SLRC_INLINE {
    if (i >= tile.rows) return;
    Unroll<Whole>([&](int v) SLRC_INLINE { Finish<kLanes>(tile, i, v * kLanes, sums[i][v]); });
    Finish<Last>(tile, i, Whole * kLanes, lasts[i]);
  });
  if (tile.activation <= kRelu) return;
  constexpr int kPixels = Whole * kLanes + Last, kStep = Last;
  for (int i = 0; i < tile.rows; ++i)
    for (int p = 0; p < kPixels; p += kStep) {
      float* y = tile.y + i * tile.pitch + p;
      Store<kStep>(y, Activate<kStep>(Load<kStep>(y), tile.activation));
    }
}

// One pixel: the lanes are the rows. Four sums, since one would wait for itself at each step.
template <int Rows>
void RunPixel(const Tile& tile) {
  using V = typename Lanes<Rows>::Float;
  V sums[4] = {Load<Rows>(tile.bias)};
  int64_t t = 0;
  for (; t + 4 <= tile.count; t += 4)
    for (int s = 0; s < 4; ++s)
      sums[s] += Load<Rows>(tile.values + (t + s) * tile.stride) * tile.x[tile.offsets[t + s]];
  for (; t < tile.count; ++t) sums[0] += Load<Rows>(tile.values + t * tile.stride) * tile.x[tile.offsets[t]];
  V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int i = 0; i < tile.rows; ++i)
    if (tile.residual) sum[i] += tile.residual[i * tile.pitch];
  sum = Activate<Rows>(sum, tile.activation);
  for (int i = 0; i < tile.rows; ++i) tile.y[i * tile.pitch] = sum[i];
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

template <int Rows, int Vectors, int Most>
constexpr TileLoop Whole() {
  if constexpr (Vectors <= Most) return RunTile<Rows, Vectors - 1, kLanes>;
  return nullptr;
}

// Where a vector is executed in two halves, a last half costs half. (Elsewhere it costs no more than a whole one.)
template <int Rows, int Vectors, int Most>
constexpr TileLoop Halved() {
  if constexpr (Vectors <= Most && kLanes == 16) return RunTile<Rows, Vectors - 1, kLanes / 2>;
  return nullptr;
}

#define SLRC_SIX(Kind, Rows, Most)                                                                                     \
  {                                                                                                                    \
    Kind<Rows, 1, Most>(), Kind<Rows, 2, Most>(), Kind<Rows, 3, Most>(), Kind<Rows, 4, Most>(), Kind<Rows, 5, Most>(), \
        Kind<Rows, 6, Most>()                                                                                          \
  }

}  // namespace

extern const TileLoops SLRC_TILE_SET = {
    SLRC_TILE_NAME,
    kLanes,
    {kVectors4, kVectors8},
    {SLRC_SIX(Whole, 4, kVectors4), SLRC_SIX(Whole, 8, kVectors8)},
    {SLRC_SIX(Halved, 4, kVectors4), SLRC_SIX(Halved, 8, kVectors8)},
    {RunPixel<4>, RunPixel<8>},
    Spin,
};

}  // namespace slrc
