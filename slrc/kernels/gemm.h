#pragma once

#include <vector>

#include "parallel.h"

namespace slrc {

class Gemm {
 public:
  explicit Gemm(Weight weight);
  explicit Gemm(const SlrcBlocks& blocks) : Gemm(Weight(blocks, 1)) {}
  int64_t out_channels() const { return weight_.out_channels; }
  void Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
           const Parallel& parallel) const;
  // The same in words; output.From(token) is the Output of RunPanel on the tokens from that one on.
  template <class Output>
  void RunTokens(const Word* x, int64_t rows, int64_t inputs, const Output& output, const Parallel& parallel) const;

 private:
  friend class Mlp;
  // Computes block rows [first, last) on the tokens of a panel; see Scratch::Get for owner and key.
  template <class Output>
  void RunPart(const Word* x, int64_t tokens, int64_t inputs, const Output& output, uint64_t owner, int64_t key,
               int64_t first, int64_t last) const;

  Weight weight_;
  int64_t width_;                 // of a tile's transposed tokens: their rows' distance
  int64_t panel_tokens_;          // whose tiles are transposed together
  std::vector<int32_t> offsets_;  // of the columns in a transposed tile of x
};

// Two matrix multiplications, one after the other on a few tokens at a time: what stands between them is never
// transposed, and stays cached.
class Mlp {
 public:
  Mlp(const SlrcBlocks& up, const SlrcBlocks& down);
  int64_t out_channels() const { return down_.out_channels; }
  void Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
           const Parallel& parallel) const;

 private:
  Gemm up_;
  Weight down_;
  int64_t pitch_;                 // of the channels between
  std::vector<int32_t> offsets_;  // of the columns of `down_` there
};

}  // namespace slrc
