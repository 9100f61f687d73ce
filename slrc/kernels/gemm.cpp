// Matrix multiplication on tokens: a tile of tokens is transposed, and is then the plane of a 1x1 convolution.
#include <algorithm>
#include <limits>

#include "panel.h"

namespace slrc {
namespace {

constexpr int64_t kFewTokens = 3;  // up to so many are computed one by one, the out channels side by side in a vector

typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));

// to[j, i] = from[i, j], four by four.
inline void TransposeFour(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  Four a = *(const LooseFour*)from, b = *(const LooseFour*)(from + from_pitch);
  Four c = *(const LooseFour*)(from + 2 * from_pitch), d = *(const LooseFour*)(from + 3 * from_pitch);
  Four ac_low = __builtin_shufflevector(a, c, 0, 4, 1, 5), ac_high = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  Four bd_low = __builtin_shufflevector(b, d, 0, 4, 1, 5), bd_high = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  *(LooseFour*)to = __builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5);
  *(LooseFour*)(to + to_pitch) = __builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7);
  *(LooseFour*)(to + 2 * to_pitch) = __builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5);
  *(LooseFour*)(to + 3 * to_pitch) = __builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7);
}

// to (columns, rows) = from (rows, columns) transposed.
void Transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4)
    for (int64_t j = 0; j < whole_columns; j += 4)
      TransposeFour(from + i * from_pitch + j, from_pitch, to + j * to_pitch + i, to_pitch);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      to[j * to_pitch + i] = from[i * from_pitch + j];
}

// y is (tokens, channels), the tile (rows, tokens).
struct TokenOutput {
  static constexpr bool kHasRows = false;
  float* y;
  const float* residual;
  int64_t channels;

  int64_t channel_stride() const { return 0; }

  void Gather(int64_t channel, int rows, const Piece& piece, float* tile) const {
    Transpose(residual + piece.x * channels + channel, channels, piece.pixels, rows, tile, kMaxTilePixels);
  }
  void Scatter(int64_t channel, int rows, const Piece& piece, const float* tile) const {
    Transpose(tile, kMaxTilePixels, rows, piece.pixels, y + piece.x * channels + channel, channels);
  }
};

// One token: its channels stand one after another.
struct OneToken {
  static constexpr bool kHasRows = true;
  float* y;
  const float* residual;

  int64_t channel_stride() const { return 1; }
  void Gather(int64_t, int, const Piece&, float*) const {}
  void Scatter(int64_t, int, const Piece&, const float*) const {}
};

}  // namespace

struct TokenPieces {
  explicit TokenPieces(const Weight& weight) : one(weight) {
    one.Add(0, 0, 1, true);
    for (int64_t count = 1; count <= kMaxTilePixels; ++count) {
      of_panel.emplace_back(weight);
      of_panel.back().Add(0, 0, count, false);
    }
  }
  Pieces one;
  std::vector<Pieces> of_panel;  // of 1, 2, ... tokens
};

Gemm::~Gemm() = default;

Gemm::Gemm(const SlrcBlocks& blocks) : weight_(blocks, 1) {
  if (weight_.largest_column >= std::numeric_limits<int32_t>::max() / kMaxTilePixels)
    throw Error("column " + std::to_string(weight_.largest_column) + " is out of range");
  for (int32_t column : weight_.columns) offsets_.push_back(column * kMaxTilePixels);
  pieces_.reset(new TokenPieces(weight_));
}

void Gemm::Run(const float* x, int64_t rows, int64_t inputs, const float* residual, float* y,
               const Parallel& parallel) const {
  if (weight_.largest_column >= inputs)
    throw Error("column " + std::to_string(weight_.largest_column) + " is out of range: the input has " +
                std::to_string(inputs));
  const int64_t outputs = weight_.out_channels;
  const bool few = rows <= kFewTokens;
  const int64_t tokens = few ? 1 : kMaxTilePixels;  // in a panel
  const uint64_t owner = NewOwner();
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = index * tokens, count = std::min(tokens, rows - begin);
    const float* from = x + begin * inputs;
    const float* added = residual ? residual + begin * outputs : nullptr;
    if (few) {
      RunPanel(weight_, 0, first, last, Panel{from, weight_.columns.data(), &pieces_->one, nullptr},
               OneToken{y + begin * outputs, added});
      return;
    }
    bool fresh;
    float* tile = Scratch::OfThisThread().Get(inputs * tokens + kMaxLanes, owner, index, &fresh);
    if (fresh) Transpose(from, inputs, count, inputs, tile, tokens);
    RunPanel(weight_, 0, first, last, Panel{tile, offsets_.data(), &pieces_->of_panel[count - 1], nullptr},
             TokenOutput{y + begin * outputs, added, outputs});
  };
  RunTasks(parallel, (rows + tokens - 1) / tokens, weight_.rows_per_group,
           static_cast<double>(weight_.values.size()) * rows, task);
}

}  // namespace slrc
