// Packed weights, and what every part of the kernels uses.
#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "block_sparse.h"
#include "tile.h"

namespace slrc {

inline int64_t CeilDiv(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// The caller's mistake; crosses no C boundary.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Returns the loops of the best instruction set, or of the one that the environment names in SLRC_KERNEL_ISA; those of
// int8 layers have as many lanes and move words alike.
const TileLoops& Loops();
const TileLoops& Int8Loops();

// Of SLRC_ACTIVATIONS; then null.
extern const char* const kActivationNames[];

// What a packed weight's sizes alone tell of it, and how many columns an out channel may have (see layer_limits.h).
void CheckSizes(const SlrcBlocks& blocks, int64_t group);
// The same of int8, and that all numbers are in range.
void CheckInt8(const SlrcInt8Blocks& blocks, int64_t group);
void CheckColumns(int64_t columns);
// A block's values as the loops read them (see TileLoops::value_words).
void PutValues(const int8_t* from, int64_t block, int words, Word* to);

// A packed weight, checked and copied.
struct Weight {
  Weight(const SlrcBlocks& blocks, int64_t group);
  Weight(const SlrcInt8Blocks& blocks, int64_t group);

  int64_t BlockRows() const { return rows_per_group * group; }
  int64_t ValueStep() const { return block * loops->value_words; }
  // Returns how many values survive; of int8 a quad's are one.
  double Surviving() const { return static_cast<double>(columns.size()) * block; }
  // Returns the out channel that a block row begins with.
  int64_t FirstChannel(int64_t block_row) const {
    const int64_t per_group = out_channels / group;
    return block_row / rows_per_group * per_group + block_row % rows_per_group * block;
  }
  // Returns the same weight with the columns of each block row in the order of key(column).
  template <class Key>
  Weight SortedBy(const Key& key) const;

  const TileLoops* loops;
  int64_t block, out_channels, group;
  int64_t rows_per_group;  // block rows
  int64_t largest_column = -1;
  bool sorted = true;  // whether columns rose within each block row, as they were given
  Activation activation;
  float slope;
  Word padding;  // of the input
  std::vector<Word> values;  // (surviving blocks, ValueStep())
  std::vector<int32_t> columns;
  std::vector<int32_t> row_pointers;
  std::vector<Word> bias;  // zeros if there is none; padded to whole blocks

 private:
  // Checks and takes what does not depend on the type of the values.
  void TakePlaces(const int32_t* from_columns, int64_t count, const int32_t* pointers);
};

template <class Key>
Weight Weight::SortedBy(const Key& key) const {
  Weight made = *this;
  std::vector<int32_t> order(columns.size());
  std::iota(order.begin(), order.end(), 0);
  for (int64_t r = 0; r < BlockRows(); ++r)
    std::stable_sort(order.begin() + row_pointers[r], order.begin() + row_pointers[r + 1],
                     [&](int32_t a, int32_t b) { return key(columns[a]) < key(columns[b]); });
  for (size_t t = 0; t < order.size(); ++t) {
    made.columns[t] = columns[order[t]];
    std::copy_n(values.begin() + order[t] * ValueStep(), ValueStep(), made.values.begin() + t * ValueStep());
  }
  return made;
}

}  // namespace slrc
