// The choice of the instruction set.
#include "processor.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "weight.h"

namespace slrc {
namespace {

// Best first; the last one runs everywhere. (build.py names them.)
const TileLoops* const kTileSets[] = {SLRC_TILE_SETS};

}  // namespace

const TileLoops* FindSet(const char* name) {
  for (const TileLoops* loops : kTileSets)
    if (!strcmp(loops->name, name)) return loops;
  return nullptr;
}

bool Runs(const Processor& processor, const TileLoops& loops) {
  constexpr uint32_t kSavesRegisters = 1u << 27;  // of leaf1_ecx: whether `saved` can be asked
  constexpr uint32_t kVectors = 0x6, kMasksAndWideVectors = 0xe0;
  uint32_t has = 0;
#define SLRC_HAS(name, macro, word, bit) has |= (processor.word >> bit & 1u) << kBitOf##macro;
  SLRC_FEATURES(SLRC_HAS)
#undef SLRC_HAS
  uint32_t saved = 0;
  if (loops.features >> kBitOfAVX & 1) saved |= kVectors;
  if (loops.features >> kBitOfAVX512F & 1) saved |= kMasksAndWideVectors;
  if (saved && !(processor.leaf1_ecx & kSavesRegisters)) return false;
  return (loops.features & ~has) == 0 && (saved & ~processor.saved) == 0;
}

namespace {

// (`__builtin_cpu_supports` needs a support library that not every toolchain links.)
Processor ThisProcessor() {
  Processor processor = {};
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return processor;
  processor.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) processor.leaf7_ebx = b;
  unsigned high;
  if (processor.leaf1_ecx >> 27 & 1) asm volatile("xgetbv" : "=a"(processor.saved), "=d"(high) : "c"(0));
#endif
  return processor;
}

const TileLoops* Choose() {
  const Processor processor = ThisProcessor();
  const char* wanted = getenv("SLRC_KERNEL_ISA");
  for (const TileLoops* loops : kTileSets)
    if ((!wanted || !*wanted || !strcmp(loops->name, wanted)) && Runs(processor, *loops)) return loops;
  return nullptr;
}

}  // namespace

const TileLoops& Loops() {
  static const TileLoops* const chosen = Choose();
  if (!chosen) throw Error("SLRC_KERNEL_ISA names an instruction set that this processor or library does not have");
  return *chosen;
}

}  // namespace slrc
