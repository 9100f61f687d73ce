// Vectors of N floats and the activations on them, for tile.cpp alone: as tile.h says, nothing here may have external
// linkage.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tile.h"

namespace slrc {
namespace {

// GCC's and Clang's vector types: arithmetic and comparison act lane by lane. The "loose" ones may stand anywhere.
template <int N>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * N)));
  typedef uint32_t Bits __attribute__((vector_size(4 * N)));
  typedef int32_t Signed __attribute__((vector_size(4 * N)));
  typedef uint16_t Shorts __attribute__((vector_size(4 * N)));
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

// The bits of a word in every lane.
template <int N>
inline typename Lanes<N>::Bits AllBits(Word word) {
  uint32_t bits;
  __builtin_memcpy(&bits, &word, sizeof bits);
  return bits - typename Lanes<N>::Bits{};
}

// Both keep a NaN in v. (x86's instructions return the second operand then; compilers make two of the comparison.)
template <int N, typename V = typename Lanes<N>::Float>
inline V AtLeast(V v, float bound) {
  const V low = All<N>(bound);
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_max_ps(low, v);
#endif
#if defined(__AVX__)
  if constexpr (N == 8) return _mm256_max_ps(low, v);
#endif
  return low > v ? low : v;
}

template <int N, typename V = typename Lanes<N>::Float>
inline V AtMost(V v, float bound) {
  const V high = All<N>(bound);
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_min_ps(high, v);
#endif
#if defined(__AVX__)
  if constexpr (N == 8) return _mm256_min_ps(high, v);
#endif
  return high < v ? high : v;
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

}  // namespace
}  // namespace slrc
