// Convolution and matrix multiplication in int8: four input channels' bytes are brought side by side as a word, sums are
// made results (see SlrcInt8Blocks), and all between is as in float32.
#pragma once

#include "conv.h"
#include "depthwise.h"
#include "gemm.h"
#include "window.h"

namespace slrc {

// How sums become results.
class Int8Rule {
 public:
  explicit Int8Rule(const SlrcInt8Blocks& blocks)
      : scale_(blocks.scale, blocks.scale + std::max<int64_t>(0, blocks.scale_count)),
        residual_scale_(blocks.residual_scale),
        slope_(blocks.slope),
        residual_zero_point_(static_cast<float>(blocks.residual_zero_point)),
        y_zero_point_(static_cast<float>(blocks.y_zero_point)),
        is_float_(blocks.y_zero_point < 0) {}

  bool is_float() const { return is_float_; }
  // Returns results of channels from `channel` on (`by_lane`: of them in every row), from `at` on in y and the residual.
  Int8Results At(int64_t channel, bool by_lane, int64_t at, const uint8_t* residual, void* y) const;

 private:
  std::vector<float> scale_;
  float residual_scale_, slope_, residual_zero_point_, y_zero_point_;
  bool is_float_;
};

class Int8Conv {
 public:
  // Blocks of one output are for depthwise layers.
  Int8Conv(const SlrcInt8Blocks& blocks, const SlrcWindow& window);
  void OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const {
    return slrc::OutputShape(window_, out_channels_, x_shape, y_shape);
  }
  // y is of the type that the blocks say.
  void Run(const uint8_t* x, const int64_t x_shape[4], const uint8_t* residual, void* y,
           const Parallel& parallel) const;

 private:
  const SlrcWindow window_;
  const int64_t out_channels_;
  const uint8_t filling_;  // of a last quad: its zero point, which adds nothing
  // One of the two.
  std::unique_ptr<const Int8Depthwise> depthwise_;
  std::unique_ptr<const Conv> conv_;
  Int8Rule rule_;
};

class Int8Gemm {
 public:
  explicit Int8Gemm(const SlrcInt8Blocks& blocks);
  int64_t out_channels() const { return gemm_.out_channels(); }
  void Run(const uint8_t* x, int64_t rows, int64_t inputs, const uint8_t* residual, void* y,
           const Parallel& parallel) const;

 private:
  const uint8_t filling_;
  Gemm gemm_;
  Int8Rule rule_;
};

}  // namespace slrc
