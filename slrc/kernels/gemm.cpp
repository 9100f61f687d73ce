// Matrix multiplication, and two of them, in float32.
#include "gemm.h"

#include <algorithm>
#include <limits>

#include "gemm_run.h"
#include "layer_limits.h"

namespace slrc {
namespace {

constexpr int64_t kHiddenFloats = 1 << 17;  // half of a second-level cache, for what stands between two matrices

// y is (tokens, channels), the tile (rows, tokens).
struct TokenOutput {
  static constexpr bool kMoreApart = true, kInParts = false;
  float* y;
  const float* residual;
  int64_t channels;

  TokenOutput From(int64_t token) const {
    return {y + token * channels, residual ? residual + token * channels : nullptr, channels};
  }
  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    const int64_t at = piece.start * channels + channel;
    *place = {y + at, residual ? residual + at : nullptr, 1, 0, channels, nullptr};
    return piece.width == 1;
  }
  void Gather(int64_t channel, int64_t count, const Piece& piece, float* sums) const {
    Loops().transpose(residual + piece.start * channels + channel, channels, piece.pixels - Apart(piece), count,
                      sums, piece.width - Apart(piece));
  }
  void Scatter(int64_t channel, int64_t count, const Piece& piece, const float* sums) const {
    Loops().transpose(sums, piece.width - Apart(piece), count, piece.pixels - Apart(piece),
                      y + piece.start * channels + channel, channels);
  }
};

// y is (channels, pitch): what the next matrix multiplication reads.
struct PlaneOutput {
  static constexpr bool kMoreApart = false, kInParts = false;
  float* y;
  int64_t pitch;

  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    *place = {y + channel * pitch + piece.start, nullptr, pitch, 0, 1, nullptr};
    return true;
  }
  void Gather(int64_t, int64_t, const Piece&, float*) const {}
  void Scatter(int64_t, int64_t, const Piece&, const float*) const {}
};

std::vector<int32_t> Offsets(const Weight& weight, int64_t pitch) {
  static_assert(kMostColumns * (kPanelTokens + kMaxLanes) <= std::numeric_limits<int32_t>::max(), "offsets are int32");
  std::vector<int32_t> offsets;
  for (int32_t column : weight.columns) offsets.push_back(static_cast<int32_t>(column * pitch));
  return offsets;
}

}  // namespace

void CheckInputs(const Weight& weight, int64_t inputs) {
  CheckColumns(inputs);
  if (weight.largest_column >= inputs)
    throw Error("column " + std::to_string(weight.largest_column) + " is out of range: the input has " +
                std::to_string(inputs));
}

Gemm::Gemm(Weight weight) : weight_(std::move(weight)) {
  const TileLoops& loops = *weight_.loops;
  const int rows = LoopsFor(loops, weight_.block);
  const bool pixel_more = loops.strip[kPixelMore][rows][0];
  width_ = loops.lanes * loops.max_vectors[rows];
  panel_tokens_ = pixel_more ? kPanelTokens : kPanelTokens / width_ * width_;
  offsets_ = Offsets(weight_, width_);
}

void Gemm::Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
               const Parallel& parallel) const {
  RunTokens(x, rows, inputs, TokenOutput{y, residual, weight_.out_channels}, parallel);
}

Mlp::Mlp(const SlrcBlocks& up, const SlrcBlocks& down) : up_(up), down_(down, 1) {
  CheckInputs(down_, up_.out_channels());
  pitch_ = up_.panel_tokens_ + kMaxLanes;  // the last tile may write past the last token
  offsets_ = Offsets(down_, pitch_);
}

void Mlp::Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
              const Parallel& parallel) const {
  CheckInputs(up_.weight_, inputs);
  const int64_t tokens = up_.panel_tokens_, panels = CeilDiv(rows, tokens), hidden_size = up_.out_channels() * pitch_;
  const int64_t together = std::max<int64_t>(1, kHiddenFloats / hidden_size);
  float* const hidden = Scratch::Hidden().Get(std::min(together, panels) * hidden_size);
  const uint64_t owner = NewOwner();
  const TokenOutput output{y, residual, down_.out_channels};
  for (int64_t done = 0; done < panels; done += together) {
    const int64_t count = std::min(together, panels - done);
    auto tokens_of = [&](int64_t index) { return std::min(tokens, rows - (done + index) * tokens); };
    auto up = [&](int64_t index, int64_t first, int64_t last) {
      const PlaneOutput plane{hidden + index * hidden_size, pitch_};
      const float* from = x + (done + index) * tokens * inputs;
      up_.RunPart(from, tokens_of(index), inputs, plane, owner, done + index, first, last);
    };
    auto down = [&](int64_t index, int64_t first, int64_t last) {
      PiecesOnStack cut;
      Cut(down_, 0, tokens_of(index), false, &cut);
      const float* plane = hidden + index * hidden_size;
      const Panel panel{plane, offsets_.data(), OneSlice(down_), cut.pieces, cut.count, 0, 1, 0, 1};
      RunPanel(down_, first, last, panel, output.From((done + index) * tokens));
    };
    const int64_t computed = std::min(rows - done * tokens, count * tokens);
    RunBlockRows(parallel, up_.weight_, count, computed, up);
    RunBlockRows(parallel, down_, count, computed, down);
  }
}

}  // namespace slrc
