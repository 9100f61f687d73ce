// Matrix multiplication on tokens: the tokens of each tile are transposed, and are then packed pixels of a 1x1
// convolution.
#include "gemm.h"

#include <algorithm>
#include <limits>

#include "layer_limits.h"
#include "panel.h"

namespace slrc {
namespace {

constexpr int64_t kPanelTokens = 98;  // whole tiles: with a pixel more, of 49, as the tokens of 7 x 7 patches are cut
constexpr int64_t kHiddenFloats = 1 << 17;  // half of a second-level cache, for what stands between two matrices
constexpr int64_t kFewTokens = 3;  // up to so many are computed one by one, the out channels side by side in a vector

// The pieces of one panel.
struct PiecesOnStack {
  void push_back(const Piece& piece) { pieces[count++] = piece; }
  const Piece& back() const { return pieces[count - 1]; }

  Piece pieces[kPanelTokens];
  int64_t count = 0;
};

// One token more than whole vectors is not transposed, but read and written where it is.
int64_t Apart(const Piece& piece) { return piece.ending == kPixelMore; }

// y is (tokens, channels), the tile (rows, tokens).
struct TokenOutput {
  static constexpr bool kMoreApart = true;
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
  static constexpr bool kMoreApart = false;
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

void CheckInputs(const Weight& weight, int64_t inputs) {
  CheckColumns(inputs);
  if (weight.largest_column >= inputs)
    throw Error("column " + std::to_string(weight.largest_column) + " is out of range: the input has " +
                std::to_string(inputs));
}

// Calls task(index, first, last) for panels 0 ... panels - 1, and block rows that fill whole vectors: they are
// transposed together.
template <class Task>
void RunBlockRows(const Parallel& parallel, const Weight& weight, int64_t panels, int64_t tokens, const Task& task) {
  const int64_t together = CeilDiv(Loops().lanes, weight.block);
  RunTasks(parallel, panels, weight.rows_per_group, together, static_cast<double>(weight.values.size()) * tokens, task);
}

}  // namespace

Gemm::Gemm(const SlrcBlocks& blocks) : weight_(blocks, 1) {
  const TileLoops& loops = Loops();
  const int rows = LoopsFor(weight_.block);
  const bool pixel_more = loops.strip[kPixelMore][rows][0];
  width_ = loops.lanes * loops.max_vectors[rows];
  panel_tokens_ = pixel_more ? kPanelTokens : kPanelTokens / width_ * width_;
  offsets_ = Offsets(weight_, width_);
}

template <class Output>
void Gemm::RunPart(const float* x, int64_t tokens, int64_t inputs, const Output& output, uint64_t owner, int64_t key,
                   int64_t first, int64_t last) const {
  PiecesOnStack cut;
  Cut(weight_.block, 0, tokens, false, &cut);
  Panel panel{x, weight_.columns.data(), OneSlice(weight_), cut.pieces, cut.count, 0, 1, 0, 1};
  if (tokens > 1) {
    bool fresh;
    panel.step = inputs * width_;
    panel.more_x = x;
    panel.more_offsets = weight_.columns.data();
    panel.more_step = inputs;
    float* tiles = Scratch::Inputs().Get(panel.count * panel.step + kMaxLanes, owner, key, &fresh);
    for (int64_t i = 0; fresh && i < panel.count; ++i)
      Loops().transpose(x + cut.pieces[i].start * inputs, inputs, cut.pieces[i].pixels - Apart(cut.pieces[i]), inputs,
                        tiles + i * panel.step, width_);
    panel.x = tiles;
    panel.offsets = offsets_.data();
  }
  RunPanel(weight_, first, last, panel, output);
}

void Gemm::Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
               const Parallel& parallel) const {
  CheckInputs(weight_, inputs);
  const int64_t tokens = rows <= kFewTokens ? 1 : panel_tokens_;  // in a panel
  const uint64_t owner = NewOwner();
  const TokenOutput output{y, residual, weight_.out_channels};
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = index * tokens, count = std::min(tokens, rows - begin);
    RunPart(x + begin * inputs, count, inputs, output.From(begin), owner, index, first, last);
  };
  RunBlockRows(parallel, weight_, CeilDiv(rows, tokens), rows, task);
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
      Cut(down_.block, 0, tokens_of(index), false, &cut);
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
