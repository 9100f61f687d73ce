// Checks and copies of packed weights, and the choice of the instruction set.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "block_sparse.h"
#include "limits.h"

namespace slrc {

const char* const kActivationNames[] = {"none", "relu", "leakyrelu", "relu6", "silu", "gelu", "hardswish", nullptr};

namespace {

Activation ParseActivation(const char* name) {
  for (int i = 0; name && kActivationNames[i]; ++i)
    if (!strcmp(name, kActivationNames[i])) return static_cast<Activation>(i);
  throw Error("activation must be none, relu, leakyrelu, relu6, silu, gelu or hardswish, got `" +
              std::string(name ? name : "") + "`");
}

void Expect(bool condition, const char* what, int64_t expected, int64_t got) {
  if (!condition)
    throw Error(std::string(what) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
}

#if defined(__x86_64__)
// Asks the processor, and whether the operating system saves the registers. (`__builtin_cpu_supports` needs a support
// library that not every toolchain links.)
bool Supports(bool avx512) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28;
  if ((c & (fma | osxsave | avx)) != (fma | osxsave | avx)) return false;
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const unsigned wanted = avx512 ? 0xe6 : 0x6;
  if ((saved & wanted) != wanted || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return b & (avx512 ? 1u << 16 : 1u << 5);
}
#endif

// Best first.
std::vector<const TileLoops*> Available() {
  std::vector<const TileLoops*> found;
#if defined(__x86_64__)
  if (Supports(true)) found.push_back(&kAvx512);
  if (Supports(false)) found.push_back(&kAvx2);
#elif defined(__aarch64__)
  found.push_back(&kNeon);
#endif
  found.push_back(&kPortable);
  return found;
}

const TileLoops* Choose() {
  const std::vector<const TileLoops*> available = Available();
  const char* wanted = getenv("SLRC_KERNEL_ISA");
  if (!wanted || !*wanted) return available[0];
  for (const TileLoops* loops : available)
    if (!strcmp(loops->name, wanted)) return loops;
  return nullptr;
}

}  // namespace

const TileLoops& Loops() {
  static const TileLoops* const chosen = Choose();
  if (!chosen) throw Error("SLRC_KERNEL_ISA names an instruction set that this processor or library does not have");
  return *chosen;
}

void CheckSizes(const SlrcBlocks& blocks, int64_t group) {
  const int64_t block = blocks.block, out_channels = blocks.out_channels, count = blocks.column_count;
  if (block != 1 && block != 4 && block != 8 && block != 16)
    throw Error("block must be 1, 4, 8 or 16, got " + std::to_string(block));
  if (out_channels < 1 || out_channels > kMostChannels || group < 1 || out_channels % group)
    throw Error("out_channels must be a positive multiple of group, got " + std::to_string(out_channels) + " and " +
                std::to_string(group));
  const int64_t rows = CeilDiv(out_channels / group, block) * group;
  Expect(blocks.row_pointer_count == rows + 1, "row pointers", rows + 1, blocks.row_pointer_count);
  Expect(count >= 0 && count <= kMostBlocks && blocks.value_count == count * block, "values",
         std::clamp<int64_t>(count, 0, kMostBlocks) * block, blocks.value_count);
  if (blocks.bias) Expect(blocks.bias_count == out_channels, "bias values", out_channels, blocks.bias_count);
}

void CheckColumns(int64_t columns) {
  if (columns > kMostColumns)
    throw Error("columns are out of range: an out channel has at most " + std::to_string(kMostColumns) + ", got " +
                std::to_string(columns));
}

Weight::Weight(const SlrcBlocks& blocks, int64_t groups)
    : block(blocks.block),
      out_channels(blocks.out_channels),
      group(groups),
      activation(ParseActivation(blocks.activation)),
      slope(blocks.slope) {
  CheckSizes(blocks, group);
  rows_per_group = CeilDiv(out_channels / group, block);
  const int64_t rows = rows_per_group * group, count = blocks.column_count;

  const int32_t* pointers = blocks.row_pointers;
  Expect(pointers[0] == 0, "the first row pointer", 0, pointers[0]);
  Expect(pointers[rows] == count, "the last row pointer", count, pointers[rows]);
  for (int64_t r = 0; r < rows; ++r)
    if (pointers[r] > pointers[r + 1]) throw Error("row pointers must not fall, as after " + std::to_string(r));
  for (int64_t t = 0; t < count; ++t) {
    if (blocks.columns[t] < 0) throw Error("columns must not be negative, got " + std::to_string(blocks.columns[t]));
    largest_column = std::max<int64_t>(largest_column, blocks.columns[t]);
  }
  CheckColumns(largest_column + 1);

  for (int64_t r = 0; r < rows; ++r)
    sorted = sorted && std::is_sorted(blocks.columns + pointers[r], blocks.columns + pointers[r + 1]);

  values.assign(blocks.values, blocks.values + count * block);
  columns.assign(blocks.columns, blocks.columns + count);
  row_pointers.assign(pointers, pointers + rows + 1);
  bias.assign(rows * block, 0.0f);
  const int64_t per_group = out_channels / group;
  for (int64_t g = 0; blocks.bias && g < group; ++g)
    std::copy_n(blocks.bias + g * per_group, per_group, bias.begin() + g * rows_per_group * block);
}

}  // namespace slrc
