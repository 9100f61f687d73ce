// Checks and copies of packed weights.
#include "weight.h"

#include <string.h>

#include <algorithm>

#include "layer_limits.h"

namespace slrc {

#define SLRC_NAME(value, name) name,
const char* const kActivationNames[] = {SLRC_ACTIVATIONS(SLRC_NAME) nullptr};
#undef SLRC_NAME

namespace {

Activation ParseActivation(const char* name) {
  std::string known;
  for (int i = 0; i < kActivations; ++i) {
    if (name && !strcmp(name, kActivationNames[i])) return static_cast<Activation>(i);
    known += std::string(i ? ", " : "") + kActivationNames[i];
  }
  throw Error("activation must be one of " + known + ", got `" + std::string(name ? name : "") + "`");
}

void Expect(bool condition, const char* what, int64_t expected, int64_t got) {
  if (!condition)
    throw Error(std::string(what) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
}

}  // namespace

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
