// Matrix multiplication on tokens: the tokens of each tile are transposed, and are then packed pixels of a 1x1
// convolution.
#include <algorithm>
#include <limits>

#include "panel.h"

namespace slrc {
namespace {

constexpr int64_t kPanelTokens = 98;  // whole tiles: with a pixel more, of 49, as the tokens of 7 x 7 patches are cut
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
  float* y;
  const float* residual;
  int64_t channels;

  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    const int64_t at = piece.start * channels + channel;
    *place = {y + at, residual ? residual + at : nullptr, 1, 0, channels};
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

}  // namespace

Gemm::Gemm(const SlrcBlocks& blocks) : weight_(blocks, 1) {
  const TileLoops& loops = Loops();
  const int rows = LoopsFor(weight_.block);
  const bool pixel_more = loops.strip[kPixelMore][rows][0];
  width_ = loops.lanes * loops.max_vectors[rows];
  panel_tokens_ = pixel_more ? kPanelTokens : kPanelTokens / width_ * width_;
  if (weight_.largest_column >= std::numeric_limits<int32_t>::max() / width_)
    throw Error("column " + std::to_string(weight_.largest_column) + " is out of range");
  for (int32_t column : weight_.columns) offsets_.push_back(static_cast<int32_t>(column * width_));
}

void Gemm::Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
               const Parallel& parallel) const {
  if (weight_.largest_column >= inputs)
    throw Error("column " + std::to_string(weight_.largest_column) + " is out of range: the input has " +
                std::to_string(inputs));
  const int64_t outputs = weight_.out_channels;
  const bool few = rows <= kFewTokens;
  const int64_t tokens = few ? 1 : panel_tokens_;  // in a panel
  const uint64_t owner = NewOwner();
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = index * tokens, count = std::min(tokens, rows - begin);
    const float* from = x + begin * inputs;
    const float* added = residual ? residual + begin * outputs : nullptr;
    const TokenOutput output{y + begin * outputs, added, outputs};
    PiecesOnStack cut;
    Cut(weight_.block, 0, count, false, &cut);
    Panel panel{from, weight_.columns.data(), OneSlice(weight_), cut.pieces, cut.count, 0, 1, 0, 1};
    if (!few) {
      bool fresh;
      panel.step = inputs * width_;
      panel.more_x = from;
      panel.more_offsets = weight_.columns.data();
      panel.more_step = inputs;
      float* tiles = Scratch::Inputs().Get(panel.count * panel.step + kMaxLanes, owner, index, &fresh);
      for (int64_t i = 0; fresh && i < panel.count; ++i)
        Loops().transpose(from + cut.pieces[i].start * inputs, inputs, cut.pieces[i].pixels - Apart(cut.pieces[i]),
                          inputs, tiles + i * panel.step, width_);
      panel.x = tiles;
      panel.offsets = offsets_.data();
    }
    RunPanel(weight_, first, last, panel, output);
  };
  RunTasks(parallel, (rows + tokens - 1) / tokens, weight_.rows_per_group,
           static_cast<double>(weight_.values.size()) * rows, task);
}

}  // namespace slrc
