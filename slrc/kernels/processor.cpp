// The choice of the instruction set.
#include "processor.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "weight.h"

namespace slrc {

#if defined(SLRC_HAS_AMX)
// The loops of vectors, and those of matrices beside them.
const TileLoops kAvx512AmxInt8 = [] {
  TileLoops loops = kAvx512VnniInt8;
  loops.name = kAvx512Amx.name;
  loops.features |= kAvx512Amx.features;
  loops.matrix = &kAvx512Amx;
  return loops;
}();
#endif

namespace {

// Best first, then null; the last one runs everywhere. There are none of int8 layers in a library that is built without
// them. (build.py names them, with a comma behind each.)
const TileLoops* const kTileSets[] = {SLRC_TILE_SETS nullptr};
const TileLoops* const kInt8Sets[] = {SLRC_INT8_SETS nullptr};

bool BeginsWith(const char* name, const char* beginning) { return !strncmp(name, beginning, strlen(beginning)); }

}  // namespace

const TileLoops* FindSet(const char* name) {
  for (const TileLoops* const* sets : {kTileSets, kInt8Sets})
    for (; *sets; ++sets)
      if (!strcmp((*sets)->name, name)) return *sets;
  return nullptr;
}

bool Runs(const Processor& processor, const TileLoops& loops) {
  constexpr uint32_t kSavesRegisters = 1u << 27;  // of leaf1_ecx: whether `saved` can be asked
  constexpr uint32_t kVectors = 0x6, kMasksAndWideVectors = 0xe0, kMatrices = 0x60000;
  uint32_t has = 0;
#define SLRC_HAS(name, macro, word, bit) has |= (processor.word >> bit & 1u) << kBitOf##macro;
  SLRC_FEATURES(SLRC_HAS)
#undef SLRC_HAS
  uint32_t saved = 0;
  if (loops.features >> kBitOf__AVX__ & 1) saved |= kVectors;
  if (loops.features >> kBitOf__AVX512F__ & 1) saved |= kMasksAndWideVectors;
  if (loops.features >> kBitOf__AMX_TILE__ & 1) saved |= kMatrices;
  if (saved && !(processor.leaf1_ecx & kSavesRegisters)) return false;
  return (loops.features & ~has) == 0 && (saved & ~processor.saved) == 0;
}

namespace {

#if defined(__x86_64__)
// Linux lets only processes that have asked for it use matrix registers.
bool MayUseMatrices() {
  constexpr long kAskForState = 0x1023, kMatrixState = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kMatrixState) == 0;
}
#endif

// (`__builtin_cpu_supports` needs a support library that not every toolchain links.)
Processor ThisProcessor() {
  Processor processor = {};
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return processor;
  processor.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    processor.leaf7_ebx = b;
    processor.leaf7_ecx = c;
    constexpr uint32_t kMatrices = 3u << 24;
    processor.leaf7_edx = d & kMatrices && !MayUseMatrices() ? d & ~kMatrices : d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) processor.leaf71_eax = a;
  }
  unsigned high;
  if (processor.leaf1_ecx >> 27 & 1) asm volatile("xgetbv" : "=a"(processor.saved), "=d"(high) : "c"(0));
#elif defined(__aarch64__)
  processor.hwcap = static_cast<uint32_t>(getauxval(AT_HWCAP));
  processor.hwcap2 = static_cast<uint32_t>(getauxval(AT_HWCAP2));
#endif
  return processor;
}

// The sets of both kinds of layers.
struct Chosen {
  const TileLoops* loops = nullptr;
  const TileLoops* int8 = nullptr;
};

Chosen Choose() {
  const Processor processor = ThisProcessor();
  const char* named = getenv("SLRC_KERNEL_ISA");
  const char* wanted = named && *named ? named : nullptr;
  for (const TileLoops* const* loops = kTileSets; *loops; ++loops) {
    if (!Runs(processor, **loops)) continue;
    if (!*kInt8Sets && (!wanted || BeginsWith(wanted, (*loops)->name))) return {*loops, nullptr};
    for (const TileLoops* const* int8 = kInt8Sets; *int8; ++int8)
      if (BeginsWith((*int8)->name, (*loops)->name) && (!wanted || !strcmp((*int8)->name, wanted)) &&
          Runs(processor, **int8))
        return {*loops, *int8};
  }
  return {};
}

const Chosen& Sets() {
  static const Chosen chosen = Choose();
  if (!chosen.loops)
    throw Error("SLRC_KERNEL_ISA names an instruction set that this processor or library does not have");
  return chosen;
}

}  // namespace

const TileLoops& Loops() { return *Sets().loops; }

const TileLoops& Int8Loops() {
  if (!Sets().int8) throw Error("this library of kernels was built without those of int8 layers");
  return *Sets().int8;
}

}  // namespace slrc
