// Checks and copies of packed weights.
#include "weight.h"

#include <string.h>

#include <algorithm>
#include <cmath>

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

namespace {

void CheckCounts(int64_t block, int64_t out_channels, int64_t group, int64_t row_pointers, int64_t columns,
                 int64_t values, int64_t values_each) {
  if (out_channels < 1 || out_channels > kMostChannels || group < 1 || out_channels % group)
    throw Error("out_channels must be a positive multiple of group, got " + std::to_string(out_channels) + " and " +
                std::to_string(group));
  const int64_t rows = CeilDiv(out_channels / group, block) * group;
  Expect(row_pointers == rows + 1, "row pointers", rows + 1, row_pointers);
  Expect(columns >= 0 && columns <= kMostBlocks && values == columns * values_each, "values",
         std::clamp<int64_t>(columns, 0, kMostBlocks) * values_each, values);
}

void CheckZeroPoint(const char* name, int64_t value, int64_t least) {
  if (value < least || value > 255)
    throw Error(std::string(name) + " must be " + std::to_string(least) + " to 255, got " + std::to_string(value));
}

}  // namespace

void PutValues(const int8_t* from, int64_t block, int words, Word* to) {
  if (words == 1) {
    memcpy(to, from, block * kQuad);
    return;
  }
  for (int64_t i = 0; i < block; ++i, from += kQuad) {
    const int16_t even[2] = {from[0], from[2]}, odd[2] = {from[1], from[3]};
    memcpy(to + i, even, sizeof even);
    memcpy(to + block + i, odd, sizeof odd);
  }
}

void CheckSizes(const SlrcBlocks& blocks, int64_t group) {
  const int64_t block = blocks.block;
  if (block != 1 && block != 4 && block != 8 && block != 16)
    throw Error("block must be 1, 4, 8 or 16, got " + std::to_string(block));
  CheckCounts(block, blocks.out_channels, group, blocks.row_pointer_count, blocks.column_count, blocks.value_count,
              block);
  if (blocks.bias) Expect(blocks.bias_count == blocks.out_channels, "bias values", blocks.out_channels,
                          blocks.bias_count);
}

void CheckInt8(const SlrcInt8Blocks& blocks, int64_t group) {
  const int64_t block = blocks.block;
  if (block != 1 && block != 4 && block != 8 && block != 16)
    throw Error("block must be 1, 4, 8 or 16, got " + std::to_string(block));
  CheckCounts(block, blocks.out_channels, group, blocks.row_pointer_count, blocks.column_count, blocks.value_count,
              block * kQuad);
  Expect(blocks.bias_count == blocks.out_channels, "bias values", blocks.out_channels, blocks.bias_count);
  Expect(blocks.scale_count == blocks.out_channels, "scales", blocks.out_channels, blocks.scale_count);
  CheckZeroPoint("x_zero_point", blocks.x_zero_point, 0);
  CheckZeroPoint("y_zero_point", blocks.y_zero_point, -1);
  CheckZeroPoint("residual_zero_point", blocks.residual_zero_point, 0);
  if (!std::isfinite(blocks.residual_scale)) throw Error("residual_scale must be finite");
  if (!std::isfinite(blocks.slope)) throw Error("slope must be finite");
  for (int64_t i = 0; i < blocks.scale_count; ++i)
    if (!std::isfinite(blocks.scale[i])) throw Error("scales must be finite, unlike that of out channel " +
                                                     std::to_string(i));
  for (int64_t i = 0; i < blocks.value_count; ++i)
    if (blocks.values[i] == -128) throw Error("values must be -127 to 127, got -128");
}

void CheckColumns(int64_t columns) {
  if (columns > kMostColumns)
    throw Error("columns are out of range: an out channel has at most " + std::to_string(kMostColumns) + ", got " +
                std::to_string(columns));
}

Weight::Weight(const SlrcBlocks& blocks, int64_t groups)
    : loops(&Loops()),
      block(blocks.block),
      out_channels(blocks.out_channels),
      group(groups),
      activation(ParseActivation(blocks.activation)),
      slope(blocks.slope),
      padding(0.0f) {
  CheckSizes(blocks, group);
  TakePlaces(blocks.columns, blocks.column_count, blocks.row_pointers);
  values.assign(blocks.values, blocks.values + blocks.value_count);
  bias.assign(BlockRows() * block, 0.0f);
  const int64_t per_group = out_channels / group;
  for (int64_t g = 0; blocks.bias && g < group; ++g)
    std::copy_n(blocks.bias + g * per_group, per_group, bias.begin() + g * rows_per_group * block);
}

// weight x (x - zero point) is what weight x x gives, with another bias. Sums wrap as the loops' do.
Weight::Weight(const SlrcInt8Blocks& blocks, int64_t groups)
    : loops(&Int8Loops()),
      block(blocks.block),
      out_channels(blocks.out_channels),
      group(groups),
      activation(kNone),
      slope(0.0f) {
  CheckInt8(blocks, group);
  TakePlaces(blocks.columns, blocks.column_count, blocks.row_pointers);
  const uint8_t zero = static_cast<uint8_t>(blocks.x_zero_point ^ loops->flip);
  memset(&padding, zero, sizeof padding);
  values.resize(blocks.column_count * ValueStep());
  for (int64_t t = 0; t < blocks.column_count; ++t)
    PutValues(blocks.values + t * block * kQuad, block, loops->value_words, values.data() + t * ValueStep());
  const int32_t as_read = loops->flip ? static_cast<int8_t>(zero) : zero;
  const int64_t per_group = out_channels / group;
  bias.assign(BlockRows() * block, 0.0f);
  for (int64_t r = 0; r < BlockRows(); ++r)
    for (int64_t i = 0; i < block; ++i) {
      const int64_t channel = r % rows_per_group * block + i;
      uint32_t sum = channel < per_group ? blocks.bias[r / rows_per_group * per_group + channel] : 0;
      for (int64_t t = row_pointers[r]; t < row_pointers[r + 1]; ++t)
        for (int64_t k = 0; k < kQuad; ++k) sum -= as_read * blocks.values[(t * block + i) * kQuad + k];
      memcpy(&bias[r * block + i], &sum, sizeof sum);
    }
}

void Weight::TakePlaces(const int32_t* from_columns, int64_t count, const int32_t* pointers) {
  rows_per_group = CeilDiv(out_channels / group, block);
  const int64_t rows = BlockRows();
  Expect(pointers[0] == 0, "the first row pointer", 0, pointers[0]);
  Expect(pointers[rows] == count, "the last row pointer", count, pointers[rows]);
  for (int64_t r = 0; r < rows; ++r)
    if (pointers[r] > pointers[r + 1]) throw Error("row pointers must not fall, as after " + std::to_string(r));
  for (int64_t t = 0; t < count; ++t) {
    if (from_columns[t] < 0) throw Error("columns must not be negative, got " + std::to_string(from_columns[t]));
    largest_column = std::max<int64_t>(largest_column, from_columns[t]);
  }
  CheckColumns(largest_column + 1);
  for (int64_t r = 0; r < rows; ++r)
    sorted = sorted && std::is_sorted(from_columns + pointers[r], from_columns + pointers[r + 1]);
  columns.assign(from_columns, from_columns + count);
  row_pointers.assign(pointers, pointers + rows + 1);
}

}  // namespace slrc
