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
  typedef uint32_t Bits __attribute__((vector_size(4 * N)));
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
  using I = typename Lanes<N>::Bits;  // whose sums may wrap: a NaN's do
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  v = AtMost<N>(AtLeast<N>(v, -87.0f), 88.0f);
  V shifted = v * 1.44269504f + round;
  V n = shifted - round;
  V r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = Polynomial<N>(r, {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f});
  return reinterpret_cast<V>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
}

// x Phi(x). erf(z) = z P(z^2) / Q(z^2) up to |z| = 4, where it is 1 to the last bit: a least-maximum fit, absolute
// error below 4e-7 with its rounding.
template <int N, typename V = typename Lanes<N>::Float>
inline V Gelu(V v) {
  V z = AtMost<N>(AtLeast<N>(v * 0.70710678f, -4.0f), 4.0f);
  V t = z * z;
  V p = Polynomial<N>(t, {1.92169444e-8f, -1.99029068e-6f, 1.55533650e-4f, 4.29296168e-3f, 5.24332225e-2f, 0.213942870f,
                          1.12837863f});
  V q = Polynomial<N>(t, {1.09801255e-3f, 1.55509245e-2f, 0.120798856f, 0.522929609f, 1.0f});
  return 0.5f * v * (1.0f + z * p / q);
}

template <int N, typename V = typename Lanes<N>::Float>
inline V Activate(V v, Activation activation, float slope) {
  switch (activation) {
    case kRelu:
      return AtLeast<N>(v, 0.0f);
    case kLeakyRelu:
      return v < 0.0f ? v * slope : v;
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

// Rows of one block row on one run of pixels.
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
};

// Calls run(tile) for every `Rows` rows on every run; the last of a block may have fewer.
template <int Rows, class Run>
SLRC_INLINE inline void ForTiles(const Strip& s, const Run& run) {
  static const float kZeros[Rows] = {};
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
                   last - channel < Rows ? last - channel : Rows};
      for (int64_t i = 0; i < s.runs; ++i) {
        run(tile);
        tile.x += s.x_step;
        tile.y += s.y_step;
        if (tile.start) tile.start += s.y_step;
      }
    }
  }
}

// Rows x (Whole vectors + one of Last lanes) accumulators in registers; a surviving column loads each vector of x once
// for all rows.
template <int Rows, int Whole, int Last>
SLRC_INLINE inline void RunTile(const Tile& tile, int64_t stride, Activation activation, float slope) {
  using V = typename Lanes<kLanes>::Float;
  using L = typename Lanes<Last>::Float;
  V sums[Rows][Whole ? Whole : 1];
  L lasts[Rows];
  Unroll<Rows>([&](int i) SLRC_INLINE {
    Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] = All<kLanes>(tile.bias[i]); });
    lasts[i] = All<Last>(tile.bias[i]);
  });
  if (tile.start)
    Unroll<Rows>([&](int i) SLRC_INLINE {
      const float* start = tile.start + i * tile.start_pitch;
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] += Load<kLanes>(start + v * kLanes); });
      lasts[i] += Load<Last>(start + Whole * kLanes);
    });

  const float* values = tile.values;
  for (const int32_t* offset = tile.offsets; offset != tile.end; ++offset, values += stride) {
    const float* x = tile.x + *offset;
    V column[Whole ? Whole : 1];
    Unroll<Whole>([&](int v) SLRC_INLINE { column[v] = Load<kLanes>(x + v * kLanes); });
    const L last = Load<Last>(x + Whole * kLanes);
    SLRC_LOAD_VALUES(Rows, values);
    Unroll<Rows>([&](int i) SLRC_INLINE {
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] += column[v] * SLRC_VALUE(i); });
      lasts[i] += last * SLRC_VALUE(i);
    });
  }

  const auto apply = [&](auto function) SLRC_INLINE {
    Unroll<Rows>([&](int i) SLRC_INLINE {
      Unroll<Whole>([&](int v) SLRC_INLINE { sums[i][v] = function(sums[i][v]); });
      lasts[i] = function(lasts[i]);
    });
  };
  if (activation == kRelu || activation == kRelu6)
    apply([](auto v) SLRC_INLINE { return AtLeast<sizeof v / sizeof(float)>(v, 0.0f); });
  if (activation == kRelu6) apply([](auto v) SLRC_INLINE { return AtMost<sizeof v / sizeof(float)>(v, 6.0f); });
  if (activation == kLeakyRelu) apply([slope](auto v) SLRC_INLINE { return v < 0.0f ? v * slope : v; });
  Unroll<Rows>([&](int i) SLRC_INLINE {
    float* y = tile.y + i * tile.pitch;
    Unroll<Whole>([&](int v) SLRC_INLINE { Store<kLanes>(y + v * kLanes, sums[i][v]); });
    Store<Last>(y + Whole * kLanes, lasts[i]);
  });
  if (activation <= kRelu6) return;
  constexpr int kPixels = Whole * kLanes + Last, kStep = Last;
  for (int i = 0; i < Rows; ++i)
    for (int p = 0; p < kPixels; p += kStep) {
      float* y = tile.y + i * tile.pitch + p;
      Store<kStep>(y, Activate<kStep>(Load<kStep>(y), activation, slope));
    }
}

// A tile of fewer rows is computed whole, aside.
template <int Rows, int Whole, int Last>
void RunStrip(const Strip& strip) {
  constexpr int kPixels = Whole * kLanes + Last;
  const Strip s = strip;  // a copy that no store can reach
  ForTiles<Rows>(s, [&](Tile tile) SLRC_INLINE {
    alignas(64) float aside[Rows * kPixels];
    float* const y = tile.y;
    if (tile.rows < Rows) {
      for (int i = 0; tile.start && i < tile.rows; ++i)
        for (int p = 0; p < kPixels; ++p) aside[i * kPixels + p] = tile.start[i * tile.start_pitch + p];
      if (tile.start) tile.start = aside;
      tile.y = aside;
      tile.start_pitch = tile.pitch = kPixels;
    }
    RunTile<Rows, Whole, Last>(tile, s.block, s.activation, s.slope);
    if (tile.rows < Rows)
      for (int i = 0; i < tile.rows; ++i)
        for (int p = 0; p < kPixels; ++p) y[i * s.pitch + p] = aside[i * kPixels + p];
  });
}

// One pixel: the lanes are the rows. Four sums, since one would wait for itself at each step.
template <int Rows>
void RunPixel(const Strip& s) {
  using V = typename Lanes<Rows>::Float;
  ForTiles<Rows>(s, [&](const Tile& tile) {
    V sums[4] = {Load<Rows>(tile.bias)};
    const int64_t count = tile.end - tile.offsets;
    int64_t t = 0;
    for (; t + 4 <= count; t += 4)
      for (int k = 0; k < 4; ++k)
        sums[k] += Load<Rows>(tile.values + (t + k) * s.block) * tile.x[tile.offsets[t + k]];
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
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

// Some channels at a time, the innermost loop: then no branch depends on how long a run is.
template <int Stride>
inline void CopyChannels(const CopyJob& given) {
  const CopyJob job = given;
  constexpr int64_t kChannels = 16;  // small enough to stay cached
  const int64_t x_step = job.x_step, to_step = job.to_step;
  // The last channels are read no further than they go.
  const int64_t bounded = Stride ? (Stride * kLanes + x_step - 1) / x_step : job.channels;
  for (int64_t first = 0; first < job.channels; first += kChannels) {
    const int64_t count = job.channels - first < kChannels ? job.channels - first : kChannels;
    const int64_t free = job.channels - bounded - first < count ? job.channels - bounded - first : count;
    const float* const x = job.x + first * x_step;
    float* const to = job.to + first * to_step;
    for (int64_t r = 0; r < job.run_count; ++r) {
      const Run run = job.runs[r];
      for (int64_t i = 0; i < run.floats; i += kLanes) {
        const float* source = x + run.from + i * job.stride;
        float* target = to + run.to + i;
        for (int64_t c = 0; c < free; ++c, source += x_step, target += to_step)
          Store<kLanes>(target, LoadApart<Stride ? Stride : 1>(source));
      }
      for (int64_t c = free < 0 ? 0 : free; c < count; ++c)
        for (int64_t i = 0; i < run.floats; ++i)
          to[c * to_step + run.to + i] = x[c * x_step + run.from + i * job.stride];
    }
    for (int64_t z = 0; z < job.zeros_count; ++z) {
      const Zeros zeros = job.zeros[z];
      float* target = to + zeros.to;
      int64_t i = 0;
      for (; i + kLanes <= zeros.floats; i += kLanes, target += kLanes)
        for (int64_t c = 0; c < count; ++c) Store<kLanes>(target + c * to_step, All<kLanes>(0.0f));
      for (; i < zeros.floats; ++i, ++target)
        for (int64_t c = 0; c < count; ++c) target[c * to_step] = 0.0f;
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
constexpr StripLoop Whole() {
  if constexpr (Vectors <= Most) return RunStrip<Rows, Vectors - 1, kLanes>;
  return nullptr;
}

// Where a vector is executed in two halves, a last half costs half. (Elsewhere it costs no more than a whole one.)
template <int Rows, int Vectors, int Most>
constexpr StripLoop Halved() {
  if constexpr (Vectors <= Most && kLanes == 16) return RunStrip<Rows, Vectors - 1, kLanes / 2>;
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
    Copy,
    Spin,
};

}  // namespace slrc
