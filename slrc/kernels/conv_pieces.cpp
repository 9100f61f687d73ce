// The pieces of a convolution's outputs, on the flat plane.
#include <algorithm>

#include "conv_layout.h"

namespace slrc {
namespace {

// One row's, repeated on all: they never cross a seam. Blocks of one row have no rows to share what is loaded, so their
// tiles take the same pixels of several rows of the image.
std::vector<Piece> CutRepeated(const Geometry& g, const Weight& weight, int64_t height) {
  std::vector<Piece> pieces;
  Cut(weight, 0, g.columns.out, g.columns.out >= Loops().lanes, &pieces);
  for (Piece& piece : pieces) piece.repeats = height;
  return pieces;
}

// Each row's own, if that hardly leaves lanes idle: tiles are then stored where they belong. None if it does.
std::vector<Piece> CutRowByRow(const Geometry& g, const Weight& weight, int64_t height) {
  const int64_t lanes = Loops().lanes, out = g.columns.out, pitch = g.store.pitch;
  const int64_t sums = kTileRows[LoopsFor(*weight.loops, weight.block)];  // for each vector
  std::vector<Piece> row, pieces;
  if (out < 2 * lanes || RoundUp(out, lanes) - pitch > pitch / 16) return {};
  Cut(weight, 0, out, true, &row);
  for (const Piece& piece : row)
    if (sums * piece.vectors < kBusySums) return {};
  for (int64_t r = 0; r < height; ++r) Cut(weight, r * pitch, out, true, &pieces);
  return pieces;
}

std::vector<Piece> CutRows(const Geometry& g, const Weight& weight, bool sliced, int64_t height) {
  if (g.reading == Reading::kRows) return CutRepeated(g, weight, height);
  std::vector<Piece> pieces;
  if (!g.IsSeamless() && !sliced) pieces = CutRowByRow(g, weight, height);
  if (pieces.empty()) Cut(weight, 0, (height - 1) * g.store.pitch + g.columns.out, IsInPlace(g.reading), &pieces);
  return pieces;
}

// Which pixels of a piece are outputs, on a plane with seams.
Outputs OutputsOf(const Geometry& g, const Piece& piece) {
  const int64_t lanes = Loops().lanes, pitch = g.store.pitch;
  Outputs found = {};
  int32_t kept = 0;
  for (int64_t p = 0, column = piece.start % pitch; p < piece.width; ++p, column = (column + 1) % pitch) {
    if (p % lanes == 0) found.at[p / lanes] = kept;
    if (column >= g.columns.out || p >= piece.pixels) continue;
    found.kept[p / lanes] = static_cast<uint16_t>(found.kept[p / lanes] | 1u << p % lanes);
    ++kept;
  }
  return found;
}

// Says of pieces that cross a seam which of their pixels are outputs, if tiles can leave the others out.
void LeaveGaps(const Geometry& g, PieceTable* table) {
  for (Piece& piece : table->pieces) {
    if (piece.start % g.store.pitch + piece.width <= g.columns.out || !piece.vectors) continue;
    table->outputs.push_back(OutputsOf(g, piece));
    piece.outputs = &table->outputs.back();
  }
}

// A single pixel has no lanes to leave out: the last ones are computed by a vector that ends with them.
void EndWithVector(int64_t pixels, std::vector<Piece>* pieces) {
  const int64_t lanes = Loops().lanes;
  while (!pieces->back().vectors) pieces->pop_back();
  if (const Piece& last = pieces->back(); last.start + last.pixels < pixels)
    pieces->push_back({pixels - lanes, lanes, lanes, 1, kWhole});
}

// Which lanes each tap reads inside the input, in the order of taps, those that read alike together.
std::vector<TapLanes> FindTapLanes(const Geometry& g, const SlrcWindow& window, const Piece& piece) {
  const int64_t lanes = Loops().lanes, height = g.rows.in, width = g.columns.in;
  std::vector<TapLanes> found;
  for (int64_t t = 0; t < g.Taps(); ++t) {
    const int64_t down = t % g.rows.kernel * window.dilations[0] - window.pads[0];
    const int64_t right = t / g.rows.kernel * window.dilations[1] - window.pads[1];
    TapLanes one = {static_cast<int32_t>(t + 1), {}};
    for (int64_t p = 0; p < piece.width; ++p) {
      const int64_t row = (piece.start + p) / width + down, column = (piece.start + p) % width + right;
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      one.read[p / lanes] = static_cast<uint16_t>(one.read[p / lanes] | (inside ? 1u << p % lanes : 0u));
    }
    if (found.empty() || !std::equal(one.read, std::end(one.read), found.back().read)) found.push_back(one);
    found.back().end = one.end;
  }
  return found;
}

}  // namespace

PieceTable CutPieces(const Geometry& g, const Weight& weight, const SlrcWindow& window, bool sliced, int64_t height) {
  PieceTable table;
  table.pieces = CutRows(g, weight, sliced, height);
  if (g.reading == Reading::kMasked) {
    EndWithVector(g.rows.in * g.columns.in, &table.pieces);
    for (Piece& piece : table.pieces) {
      const std::vector<TapLanes>& found = table.tap_lanes.emplace_back(FindTapLanes(g, window, piece));
      piece.tap_lanes = found.data();
      piece.tap_lanes_count = static_cast<int64_t>(found.size());
    }
  }
  const bool leaves_gaps = weight.loops->masks && !sliced && IsCheap(weight.activation);
  if (leaves_gaps && !g.IsSeamless() && g.reading != Reading::kRows) LeaveGaps(g, &table);
  return table;
}

}  // namespace slrc
