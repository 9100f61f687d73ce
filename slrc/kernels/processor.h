// Which instruction sets a processor runs: a set needs every feature that the compiler was allowed to use for its
// loops. tile.cpp asks the compiler which those are (they follow from the flags in build.py), and its TileLoops say so.
#pragma once

#include <stdint.h>

#include "tile.h"

namespace slrc {

// CPUID's words that tell of features, and which registers the operating system saves (XCR0); zeros if unknown.
struct Processor {
  uint32_t leaf1_ecx, leaf7_ebx, saved;
};

// X(name in the compiler's flags, the same in its macros, word of Processor, bit there). A set of features is a word
// with the bit k for the k-th of these.
#define SLRC_FEATURES(X)             \
  X("sse3", SSE3, leaf1_ecx, 0)      \
  X("ssse3", SSSE3, leaf1_ecx, 9)    \
  X("fma", FMA, leaf1_ecx, 12)       \
  X("sse4.1", SSE4_1, leaf1_ecx, 19) \
  X("sse4.2", SSE4_2, leaf1_ecx, 20) \
  X("popcnt", POPCNT, leaf1_ecx, 23) \
  X("avx", AVX, leaf1_ecx, 28)       \
  X("f16c", F16C, leaf1_ecx, 29)     \
  X("avx2", AVX2, leaf7_ebx, 5)      \
  X("avx512f", AVX512F, leaf7_ebx, 16)   \
  X("avx512dq", AVX512DQ, leaf7_ebx, 17) \
  X("avx512bw", AVX512BW, leaf7_ebx, 30) \
  X("avx512vl", AVX512VL, leaf7_ebx, 31)

#define SLRC_BIT_OF(name, macro, word, bit) kBitOf##macro,
enum { SLRC_FEATURES(SLRC_BIT_OF) kFeatures };
#undef SLRC_BIT_OF

// Returns the loops of that name, or null.
const TileLoops* FindSet(const char* name);

bool Runs(const Processor& processor, const TileLoops& loops);

}  // namespace slrc
