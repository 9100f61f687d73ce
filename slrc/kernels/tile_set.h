// The instruction set that a compilation of tile.cpp is for: its vectors, how large its tiles are, and what it can
// mask. As tile.h says, nothing here may have external linkage.
#pragma once

#include "lanes.h"
#include "tile.h"

namespace slrc {
namespace {

#if defined(__SANITIZE_ADDRESS__)
#define SLRC_INLINE
#else
#define SLRC_INLINE __attribute__((always_inline))
#endif

// Where bytes are multiplied in pairs, a column takes two passes (see tile_arithmetic.h), and another register.
#if defined(SLRC_TILE_INT8) && defined(__x86_64__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define SLRC_IN_PAIRS
constexpr int kPasses = 2;
#else
constexpr int kPasses = 1;
#endif

// With a sanitizer's checks compilers take many minutes for tiles of so many sizes; fewer go through the same lines.
#if defined(__AVX512F__) && defined(__SANITIZE_ADDRESS__)
constexpr int kLanes = 16, kVectors4 = 1, kVectors8 = 2;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kVectors4 = kPasses > 1 ? 4 : 6, kVectors8 = kPasses > 1 ? 2 : 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors4 = kPasses > 1 ? 2 : 3, kVectors8 = 0;
#elif defined(SLRC_TILE_MATMUL)
constexpr int kLanes = 4, kVectors4 = 5, kVectors8 = 2;  // two columns brought side by side take registers too
#elif defined(SLRC_TILE_NEON)
constexpr int kLanes = 4, kVectors4 = 6, kVectors8 = 3;
#else
constexpr int kLanes = 4, kVectors4 = kPasses > 1 ? 2 : 3, kVectors8 = 0;
#endif
#if defined(SLRC_TILE_INT8)
constexpr int kVectors1 = 0;
#else
constexpr int kVectors1 = 2;  // of several runs
#endif
constexpr bool kManyRegisters = kVectors8 > 0;  // 32, not 16

// How many runs a tile takes: one row alone keeps too few sums for multiply-adds not to wait for each other.
constexpr int RunsOf(int rows, int vectors) {
#if defined(__SANITIZE_ADDRESS__)
  constexpr int kSums = 2;
#else
  constexpr int kSums = 8;
#endif
  return rows > 1 || vectors > kSums ? 1 : kSums / vectors;
}

// Calls body(0), ..., body(Count - 1), written out early enough for the compiler to keep arrays in registers.
template <int Count, class Body>
SLRC_INLINE inline void Unroll(const Body& body) {
  if constexpr (Count > 0) {
    Unroll<Count - 1>(body);
    body(Count - 1);
  }
}

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

// Returns v, which is not loaded again at each use: of loads that cross a cache line that would be felt.
template <class V>
SLRC_INLINE inline V InRegister(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The lanes of v that `kept` has a bit of, side by side; and back, with zeros for the others. (Of other instruction
// sets nothing does it faster than storing all and copying.)
#if defined(__AVX512F__)
constexpr bool kMasks = true;
template <int N>
SLRC_INLINE inline void StoreKept(float* p, typename Lanes<N>::Float v, uint32_t kept) {
  const uint32_t first = (1u << __builtin_popcount(kept)) - 1;
  if constexpr (N == 16) _mm512_mask_storeu_ps(p, first, _mm512_maskz_compress_ps(kept, v));
  else _mm256_mask_storeu_ps(p, first, _mm256_maskz_compress_ps(kept, v));
}
template <int N>
SLRC_INLINE inline typename Lanes<N>::Float LoadKept(const float* p, uint32_t kept) {
  const uint32_t first = (1u << __builtin_popcount(kept)) - 1;
  if constexpr (N == 16) return _mm512_maskz_expand_ps(kept, _mm512_maskz_loadu_ps(first, p));
  else return _mm256_maskz_expand_ps(kept, _mm256_maskz_loadu_ps(first, p));
}
// Padding for the lanes that `read` has no bit of.
template <int N>
SLRC_INLINE inline typename Lanes<N>::Float LoadLanes(const Word* p, uint32_t read, Word padding) {
#if defined(SLRC_TILE_INT8)
  const auto other = reinterpret_cast<typename Lanes<N>::Float>(AllBits<N>(padding));
  if constexpr (N == 16) return _mm512_mask_loadu_ps(other, read, p);
  else return _mm256_mask_loadu_ps(other, read, p);
#else
  (void)padding;  // zero, which costs no register
  if constexpr (N == 16) return _mm512_maskz_loadu_ps(read, p);
  else return _mm256_maskz_loadu_ps(read, p);
#endif
}
#else
constexpr bool kMasks = false;
template <int N>
void StoreKept(float*, typename Lanes<N>::Float, uint32_t);
template <int N>
typename Lanes<N>::Float LoadKept(const float*, uint32_t);
template <int N>
typename Lanes<N>::Float LoadLanes(const Word*, uint32_t, Word);
#endif

}  // namespace
}  // namespace slrc
