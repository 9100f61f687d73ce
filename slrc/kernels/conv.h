#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "parallel.h"

namespace slrc {

struct Layout;  // where a convolution finds each column in an input of one size

// A convolution with a packed weight, on inputs of any size, in words.
class Conv {
 public:
  Conv(Weight weight, const SlrcWindow& window);
  ~Conv();
  // Returns the shape of y.
  void OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const;
  // See conv_run.h.
  template <class MakeOutput>
  void Run(const Word* x, const int64_t x_shape[4], const MakeOutput& make_output, const Parallel& parallel) const;

 private:
  std::shared_ptr<const Layout> FindLayout(const int64_t x_shape[4]) const;
  std::shared_ptr<const Weight> WeightInOrder(bool by_tap) const;

  const SlrcWindow window_;
  const int64_t out_channels_;
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<const Layout>> layouts_;  // of the latest sizes
  // With the columns of each block row by channel, and by tap: the order that the layouts use, in practice one of them.
  mutable std::shared_ptr<const Weight> by_channel_, by_tap_;
};

class FloatConv {
 public:
  FloatConv(const SlrcBlocks& blocks, const SlrcWindow& window) : conv_(Weight(blocks, window.group), window) {}
  const Conv& conv() const { return conv_; }
  void Run(const float* x, const int64_t x_shape[4], const float* residual, float* y, const Parallel& parallel) const;

 private:
  Conv conv_;
};

}  // namespace slrc
