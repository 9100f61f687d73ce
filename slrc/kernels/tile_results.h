// Vectors of int8 layers' sums made results, in registers (see Int8Results in tile.h). For tile.cpp alone.
#pragma once

#include "tile_arithmetic.h"

namespace slrc {
namespace {

// Returns v, rounded: no compiler may go on with its exact value.
template <class V>
SLRC_INLINE inline V Rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// What a sum becomes before it is rounded, the same for all of a job: scaled alone; with a residual added; with an
// activation, and a residual if there is one.
enum Making { kScaled, kAdded, kActivated };

// Calls make(m) with a MakingOf that says `kMaking` to the compiler.
template <Making M>
struct MakingOf {
  static constexpr Making kMaking = M;
};
template <class Make>
SLRC_INLINE inline void ForMaking(const Int8Results& job, const Make& make) {
  if (job.slope != 1.0f) make(MakingOf<kActivated>());
  else if (job.residual) make(MakingOf<kAdded>());
  else make(MakingOf<kScaled>());
}

#if defined(SLRC_TILE_INT8) && defined(__AVX512F__)

// Of 16 bits for each vector, the first `count`.
template <int Vectors>
SLRC_INLINE inline uint64_t FirstBits(int64_t count) {
  return count >= 16 * Vectors ? ~0ull >> (64 - 16 * Vectors) : (1ull << count) - 1;
}

template <Making M>
SLRC_INLINE inline __m512 RealOf(const Int8Results& job, __m512i sums, __m512 scale, __mmask16 mask, int64_t at) {
  __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
  if (M == kScaled) return real;
  if (M == kAdded || job.residual) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, job.residual + at));
    const __m512 shifted = _mm512_sub_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(job.residual_zero_point));
    real = _mm512_add_ps(Rounded(real), Rounded(_mm512_mul_ps(shifted, _mm512_set1_ps(job.residual_scale))));
  }
  if (M == kAdded) return real;
  const __mmask16 below = _mm512_cmp_ps_mask(real, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_mul_ps(real, below, real, _mm512_set1_ps(job.slope));
}

// What is too small becomes the least integer; so would what is too large.
template <int Vectors>
SLRC_INLINE inline void StoreQuantized(const Int8Results& job, const __m512* real, uint64_t bits, int64_t at) {
  __m512i integers[4] = {};
  Unroll<Vectors>([&](int v) SLRC_INLINE {
    integers[v] = _mm512_cvtps_epi32(_mm512_min_ps(real[v], _mm512_set1_ps(32767.0f)));
  });
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(job.y_zero_point));
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(integers[0], integers[1]), zero);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(integers[2], integers[3]), zero);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
  _mm512_mask_storeu_epi8(job.y + at, bits, bytes);
}

// A row of a tile whose vectors stand side by side in y.
template <Making M, int Whole, int Last>
SLRC_INLINE inline void FinishInRegisters(const Int8Results& job, int64_t row, const typename Lanes<16>::Float* whole,
                                          typename Lanes<Last>::Float last) {
  constexpr int kVectors = Whole + 1;
  const __m512 scale = _mm512_set1_ps(job.scale[row]);
  const auto sums_of = [&](int v) SLRC_INLINE {
    if (v < Whole) return _mm512_castps_si512((__m512)whole[v]);
    if constexpr (Last == 16) return _mm512_castps_si512((__m512)last);
    else return _mm512_zextsi256_si512(_mm256_castps_si256((__m256)last));
  };
  Unroll<(kVectors + 3) / 4>([&](int group) SLRC_INLINE {
    constexpr int kMost = kVectors < 4 ? kVectors : 4;
    const int64_t at = row * job.pitch + 64 * group, left = job.count - 64 * group;
    if (left <= 0) return;
    const uint64_t bits = FirstBits<kMost>(left);
    __m512 real[kMost] = {};
    Unroll<kMost>([&](int v) SLRC_INLINE {
      if (4 * group + v >= kVectors) return;
      const __mmask16 mask = static_cast<__mmask16>(bits >> 16 * v);
      real[v] = RealOf<M>(job, sums_of(4 * group + v), scale, mask, at + 16 * v);
    });
    StoreQuantized<kMost>(job, real, bits, at);
  });
}

constexpr bool kFuses = true;

#elif defined(SLRC_TILE_INT8)

using Real = Lanes<kLanes>::Float;
using Integers = Lanes<kLanes>::Signed;

SLRC_INLINE inline Real LoadBytes(const uint8_t* from) {
#if defined(__AVX2__)
  return (Real)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return Real{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
              static_cast<float>(from[3])};
#endif
}

SLRC_INLINE inline void StoreBytes(uint8_t* to, Integers v) {
#if defined(__AVX2__)
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
#else
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(v[i]);
#endif
}

template <Making M>
SLRC_INLINE inline Real RealOf(const Int8Results& job, Real sums, Real scale, int64_t at) {
  Real real = __builtin_convertvector(reinterpret_cast<Integers>(sums), Real) * scale;
  if (M == kScaled) return real;
  if (M == kAdded || job.residual) {
    const Real shifted = LoadBytes(job.residual + at) - job.residual_zero_point;
    real = Rounded(real) + Rounded(shifted * job.residual_scale);
  }
  if (M == kAdded) return real;
  real = Rounded(real);
  return real < 0.0f ? real * job.slope : real;
}

// Adding 1.5 x 2^23 rounds what is small to an integer, halves to even, and leaves it in the low bits.
SLRC_INLINE inline Integers QuantizedOf(const Int8Results& job, Real real) {
  constexpr float kRound = 12582912.0f;
  constexpr int32_t kRoundBits = 0x4b400000;
  real = AtMost<kLanes>(AtLeast<kLanes>(Rounded(real), -job.y_zero_point), 255.0f - job.y_zero_point);
  const Integers rounded = reinterpret_cast<Integers>(Rounded(real + kRound));
  return rounded - (kRoundBits - static_cast<int32_t>(job.y_zero_point));
}

// A row of a tile whose vectors stand side by side in y, all of them results.
template <Making M, int Whole, int Last>
SLRC_INLINE inline void FinishInRegisters(const Int8Results& job, int64_t row, const Real* whole, Real last) {
  static_assert(Last == kLanes);
  const Real scale = All<kLanes>(job.scale[row]);
  const int64_t at = row * job.pitch;
  Unroll<Whole + 1>([&](int v) SLRC_INLINE {
    const int64_t here = at + v * kLanes;
    StoreBytes(job.y + here, QuantizedOf(job, RealOf<M>(job, v < Whole ? whole[v] : last, scale, here)));
  });
}

constexpr bool kFuses = true;

#else

constexpr bool kFuses = false;
template <Making M, int Whole, int Last>
void FinishInRegisters(const Int8Results&, int64_t, const typename Lanes<kLanes>::Float*, typename Lanes<Last>::Float);

#endif

}  // namespace
}  // namespace slrc
