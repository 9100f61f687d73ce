// What a tile's words are and how they are multiplied and added: floats, or (SLRC_TILE_INT8) the bytes of four input
// channels and int32 sums, which wrap. For tile.cpp alone.
//
// Four products of bytes are added to a sum exactly: by VNNI or NEON's dot product; otherwise products of 16 bits, which
// hold any unsigned byte times any signed one, are added in pairs to 32 bits. x86 does so in two passes, first with the
// even bytes and then with the odd ones, whose values are 16 bits each already (see TileLoops::value_words): both at
// once take more registers than there are, and compilers must be kept from adding both first. NEON multiplies signed
// bytes: x comes to it flipped (see TileLoops), and no sum of two products is as much as 2 x 128 x 127. Its matrix
// product adds eight products to each of four sums.
#pragma once

#include "tile_set.h"

#if defined(SLRC_TILE_NEON)
#include <arm_neon.h>
#endif

// What tells the assembler of instructions that the compiler does not know to be allowed.
#if defined(__ARM_FEATURE_DOTPROD)
#define SLRC_ALLOW_DOT
#else
#define SLRC_ALLOW_DOT ".arch armv8.2-a+dotprod\n\t"
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define SLRC_ALLOW_MATMUL
#else
#define SLRC_ALLOW_MATMUL ".arch armv8.2-a+i8mm\n\t"
#endif

namespace slrc {
namespace {

#if !defined(SLRC_TILE_INT8)

template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V Repeat(Word word) {
  return All<N>(word);
}

template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V Add(V a, V b) {
  return a + b;
}

template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V MultiplyAdd(V sum, V x, V value) {
  return sum + x * value;
}

#else

template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V Repeat(Word word) {
  return reinterpret_cast<V>(AllBits<N>(word));
}

template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V Add(V a, V b) {
  using Bits = typename Lanes<N>::Bits;
  return reinterpret_cast<V>(reinterpret_cast<Bits>(a) + reinterpret_cast<Bits>(b));
}

#if defined(SLRC_TILE_NEON)
constexpr uint8_t kFlip = 0x80;
#else
constexpr uint8_t kFlip = 0;
#endif

// Byte k of every lane, of x (unsigned unless flipped) and of a value (signed).
template <int N>
SLRC_INLINE inline typename Lanes<N>::Signed Byte(typename Lanes<N>::Float v, int k, bool is_signed) {
  using Signed = typename Lanes<N>::Signed;
  const auto high = reinterpret_cast<typename Lanes<N>::Bits>(v) << (24 - 8 * k);
  return is_signed ? reinterpret_cast<Signed>(high) >> 24 : reinterpret_cast<Signed>(high >> 24);
}

#if defined(SLRC_IN_PAIRS)
// The bytes of one pass, as 16 bits each.
template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V BytesOf(V x, int pass) {
  const auto shorts = reinterpret_cast<typename Lanes<N>::Shorts>(x);
  return reinterpret_cast<V>(pass ? shorts >> 8 : shorts & 0xff);
}
#define SLRC_DOT_PAIRS(M, bits)                                                         \
  SLRC_INLINE inline __m##M##i DotPairs(__m##M##i sum, __m##M##i x, __m##M##i value) {  \
    return InRegister(bits##_add_epi32(sum, bits##_madd_epi16(x, value)));              \
  }
SLRC_DOT_PAIRS(128, _mm)
#if defined(__AVX2__)
SLRC_DOT_PAIRS(256, _mm256)
#endif
#if defined(__AVX512BW__)
SLRC_DOT_PAIRS(512, _mm512)
#endif
#endif

// sum + the products of x's four bytes and the value's; in pairs, of those of one pass.
template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V MultiplyAdd(V sum, V x, V value) {
#if defined(__x86_64__)
#if defined(__AVX512VNNI__)
#define SLRC_DOT(bits) bits##_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define SLRC_DOT(bits) bits##_dpbusd_avx_epi32
#else
#define SLRC_DOT(bits) DotPairs
#endif
#define SLRC_CALL(M, bits) (V) SLRC_DOT(bits)((__m##M##i)sum, (__m##M##i)x, (__m##M##i)value)
#if defined(__AVX512F__)
  if constexpr (N == 16) return SLRC_CALL(512, _mm512);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return SLRC_CALL(256, _mm256);
#endif
  if constexpr (N == 4) return SLRC_CALL(128, _mm);
#elif defined(SLRC_TILE_DOT)  // (Compilers disagree on the flag that allows the intrinsic.)
  if constexpr (N == 4) {
    asm(SLRC_ALLOW_DOT "sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(value));
    return sum;
  }
#elif defined(SLRC_TILE_NEON)
  if constexpr (N == 4) {
    const int8x16_t a = (int8x16_t)x, b = (int8x16_t)value;
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return (V)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
  }
#endif
  auto total = reinterpret_cast<typename Lanes<N>::Bits>(sum);
  for (int k = 0; k < 4; ++k)
    total += reinterpret_cast<typename Lanes<N>::Bits>(Byte<N>(x, k, kFlip) * Byte<N>(value, k, true));
  return reinterpret_cast<V>(total);
}

#endif

#if !defined(SLRC_IN_PAIRS)
template <int N, typename V = typename Lanes<N>::Float>
SLRC_INLINE inline V BytesOf(V x, int) {
  return x;
}
#endif

#if defined(SLRC_TILE_MATMUL)
// Two columns of two rows at once, on two pixels. A vector then holds
//   x       pixel 0's words of both columns, pixel 1's
//   value   row 0's words of both columns, row 1's
//   sum     row 0's sums of both pixels, row 1's
constexpr bool kByTwo = true;
using Four = Lanes<4>::Float;
using Two = Lanes<2>::Float;

// The words of a and b in turn, of the first halves and of the second.
SLRC_INLINE inline Four FirstInTurn(Four a, Four b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
SLRC_INLINE inline Four SecondInTurn(Four a, Four b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
SLRC_INLINE inline Four InTurn(Two a, Two b) { return __builtin_shufflevector(a, b, 0, 2, 1, 3); }

// Two rows of four sums as two vectors of a matrix product, and back.
SLRC_INLINE inline void TurnSums(Four* a, Four* b) {
  const Four first = __builtin_shufflevector(*a, *b, 0, 1, 4, 5);
  *b = __builtin_shufflevector(*a, *b, 2, 3, 6, 7);
  *a = first;
}

SLRC_INLINE inline Four MultiplyAddTwo(Four sum, Four value, Four x) {
  asm(SLRC_ALLOW_MATMUL "smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(value), "w"(x));
  return sum;
}
#else
constexpr bool kByTwo = false;
#endif

}  // namespace
}  // namespace slrc
