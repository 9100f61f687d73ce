// A run of a matrix multiplication on tokens, whatever its outputs are: gemm.cpp and int8.cpp say what becomes of the
// sums. The tokens of each tile are transposed, and are then packed pixels of a 1x1 convolution.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "panel.h"

namespace slrc {

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
inline int64_t Apart(const Piece& piece) { return piece.ending == kPixelMore; }

// Throws unless an input of so many words has every column.
void CheckInputs(const Weight& weight, int64_t inputs);

// Calls task(index, first, last) for panels 0 ... panels - 1, and block rows that fill whole vectors: they are
// transposed together.
template <class Task>
void RunBlockRows(const Parallel& parallel, const Weight& weight, int64_t panels, int64_t tokens, const Task& task) {
  const int64_t together = CeilDiv(Loops().lanes, weight.block);
  RunTasks(parallel, panels, weight.rows_per_group, together, weight.Surviving() * tokens, task);
}

template <class Output>
void Gemm::RunPart(const Word* x, int64_t tokens, int64_t inputs, const Output& output, uint64_t owner, int64_t key,
                   int64_t first, int64_t last) const {
  PiecesOnStack cut;
  Cut(weight_, 0, tokens, false, &cut);
  Panel panel{x, weight_.columns.data(), OneSlice(weight_), cut.pieces, cut.count, 0, 1, 0, 1};
  if (tokens > 1) {
    bool fresh;
    panel.step = inputs * width_;
    panel.more_x = x;
    panel.more_offsets = weight_.columns.data();
    panel.more_step = inputs;
    Word* tiles = Scratch::Inputs().Get(panel.count * panel.step + kMaxLanes, owner, key, &fresh);
    for (int64_t i = 0; fresh && i < panel.count; ++i)
      Loops().transpose(x + cut.pieces[i].start * inputs, inputs, cut.pieces[i].pixels - Apart(cut.pieces[i]), inputs,
                        tiles + i * panel.step, width_);
    panel.x = tiles;
    panel.offsets = offsets_.data();
  }
  RunPanel(weight_, first, last, panel, output);
}

template <class Output>
void Gemm::RunTokens(const Word* x, int64_t rows, int64_t inputs, const Output& output,
                     const Parallel& parallel) const {
  CheckInputs(weight_, inputs);
  const int64_t tokens = rows <= kFewTokens ? 1 : panel_tokens_;  // in a panel
  const uint64_t owner = NewOwner();
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t begin = index * tokens, count = std::min(tokens, rows - begin);
    RunPart(x + begin * inputs, count, inputs, output.From(begin), owner, index, first, last);
  };
  RunBlockRows(parallel, weight_, CeilDiv(rows, tokens), rows, task);
}

}  // namespace slrc
