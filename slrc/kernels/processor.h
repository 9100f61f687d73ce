// Which instruction sets a processor runs: a set needs every feature that the compiler was allowed to use for its
// loops. tile.cpp asks the compiler which those are (they follow from the flags in build.py), and its TileLoops say so.
#pragma once

#include <stdint.h>

#include "tile.h"

namespace slrc {

// CPUID's words that tell of features, and which registers the operating system saves (XCR0); of aarch64 what Linux says
// of the hardware (AT_HWCAP, AT_HWCAP2). Zeros if unknown.
struct Processor {
  uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf71_eax, saved, hwcap, hwcap2;
};

// X(name in the compiler's flags, its macro, word of Processor, bit there). A set of features is a word with the bit k
// for the k-th of these.
#define SLRC_FEATURES(X)                               \
  X("sse3", __SSE3__, leaf1_ecx, 0)                    \
  X("ssse3", __SSSE3__, leaf1_ecx, 9)                  \
  X("fma", __FMA__, leaf1_ecx, 12)                     \
  X("sse4.1", __SSE4_1__, leaf1_ecx, 19)               \
  X("sse4.2", __SSE4_2__, leaf1_ecx, 20)               \
  X("popcnt", __POPCNT__, leaf1_ecx, 23)               \
  X("avx", __AVX__, leaf1_ecx, 28)                     \
  X("f16c", __F16C__, leaf1_ecx, 29)                   \
  X("avx2", __AVX2__, leaf7_ebx, 5)                    \
  X("avx512f", __AVX512F__, leaf7_ebx, 16)             \
  X("avx512dq", __AVX512DQ__, leaf7_ebx, 17)           \
  X("avx512bw", __AVX512BW__, leaf7_ebx, 30)           \
  X("avx512vl", __AVX512VL__, leaf7_ebx, 31)           \
  X("avx512vnni", __AVX512VNNI__, leaf7_ecx, 11)       \
  X("amx-tile", __AMX_TILE__, leaf7_edx, 24)           \
  X("amx-int8", __AMX_INT8__, leaf7_edx, 25)           \
  X("avxvnni", __AVXVNNI__, leaf71_eax, 4)             \
  X("dotprod", SLRC_TILE_DOT, hwcap, 20)               \
  X("i8mm", SLRC_TILE_MATMUL, hwcap2, 13)

#define SLRC_BIT_OF(name, macro, word, bit) kBitOf##macro,
enum { SLRC_FEATURES(SLRC_BIT_OF) kFeatures };
#undef SLRC_BIT_OF

// In SLRC_FEATURES, those that the compiler may use where this is expanded: their macros are then 1, not themselves.
#define SLRC_TEXT_OF(text) #text
#define SLRC_EXPANDED(macro) SLRC_TEXT_OF(macro)
#define SLRC_USED(name, macro, word, bit) | (SLRC_EXPANDED(macro)[0] == '1' ? 1u << kBitOf##macro : 0u)

// Returns the loops of that name, or null.
const TileLoops* FindSet(const char* name);

bool Runs(const Processor& processor, const TileLoops& loops);

}  // namespace slrc
