// Depthwise convolution in int8: each channel of the input has its own windows. Here the four bytes of a word are
// neighbours along a row, four taps of it, not four input channels (see README.md).
#pragma once

#include "parallel.h"

namespace slrc {

class Int8Rule;

class Int8Depthwise {
 public:
  // Throws Error if a stride or dilation along a row is not for words of neighbours (see layer_limits.h).
  Int8Depthwise(const SlrcInt8Blocks& blocks, const SlrcWindow& window);
  void Run(const uint8_t* x, const int64_t x_shape[4], const Int8Rule& rule, const uint8_t* residual, void* y,
           const Parallel& parallel) const;

 private:
  const SlrcWindow window_;
  int64_t out_channels_;
  uint8_t zero_point_;
  std::vector<Word> values_;  // (out channels, words of the window, value_words)
  std::vector<Word> bias_;    // (out channels)
};

}  // namespace slrc
