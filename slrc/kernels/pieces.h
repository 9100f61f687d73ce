// How the pixels of a panel are cut into pieces, each as wide as a tile; README.md draws them.
#pragma once

#include <algorithm>

#include "weight.h"

namespace slrc {

constexpr int64_t kBusySums = 12;  // of a tile, in registers; with fewer, multiply-adds wait for each other

// A run of pixels that one tile computes: vectors and how they end, or a single pixel (vectors == 0).
struct Piece {
  int64_t start, pixels;
  int64_t width;  // pixels read and written: some may stand out past the end
  int vectors;
  Ending ending;
  int64_t repeats = 1;  // on so many rows of a plane, each in the same place
  const TapLanes* tap_lanes = nullptr;  // as in Strip
  int64_t tap_lanes_count = 0;
  const Outputs* outputs = nullptr;  // which of its pixels are; null: all, or a tile cannot leave the others out
};

// Returns the piece that begins at `start`, for tiles of `rows` rows. Where nothing may be written past `end`
// (`exact`), the last piece begins early enough to end there, and some pixels are computed twice; so end must be at
// least the lanes, or at most 2.
inline Piece NextPiece(int64_t start, int64_t end, int64_t rows, int64_t lanes, int64_t most, bool may_halve,
                       bool may_add, bool exact) {
  const int64_t left = end - start, whole = left / lanes, rest = left % lanes;
  // Of `count` vectors those of the next tile, so that the last are not left with too few.
  auto share = [most](int64_t count) { return count <= most ? count : count < 2 * most ? (count + 1) / 2 : most; };
  const int64_t busy = CeilDiv(kBusySums, rows);
  if (may_add && rest && rest < rows && rest * std::min(busy, most) <= whole) {
    const int64_t vectors = std::min(share(whole), std::max(busy, CeilDiv(whole, rest)));
    return {start, vectors * lanes + 1, vectors * lanes + 1, static_cast<int>(vectors), kPixelMore};
  }
  int64_t vectors = rest <= 2 ? whole : whole + 1;  // a pixel or two are cheaper alone
  if (vectors == 0) return {start, 1, 1, 0, kWhole};
  vectors = share(vectors);
  if (vectors <= whole) return {start, vectors * lanes, vectors * lanes, static_cast<int>(vectors), kWhole};

  const bool halved = may_halve && rest <= lanes / 2;
  const int64_t width = vectors * lanes - (halved ? lanes / 2 : 0);
  const Ending ending = halved ? kHalf : kWhole;
  if (!exact) return {start, left, width, static_cast<int>(vectors), ending};
  if (width <= end) return {end - width, width, width, static_cast<int>(vectors), ending};
  if (whole) return {start, whole * lanes, whole * lanes, static_cast<int>(whole), kWhole};
  return {end - lanes, lanes, lanes, 1, kWhole};
}

// Which loops a weight of this block runs on, as an index into TileLoops.
inline int LoopsFor(const TileLoops& loops, int64_t block) {
  return block == 1 ? 0 : block >= 8 && loops.max_vectors[2] ? 2 : 1;
}

// Cuts `length` pixels from `origin` on into pieces.
template <class Pieces>
void Cut(const Weight& weight, int64_t origin, int64_t length, bool exact, Pieces* pieces) {
  const TileLoops& loops = *weight.loops;
  const int wide = LoopsFor(loops, weight.block);
  for (int64_t start = 0; start < length;) {
    Piece piece = NextPiece(start, length, kTileRows[wide], loops.lanes, loops.max_vectors[wide],
                            loops.strip[kHalf][wide][0], loops.strip[kPixelMore][wide][0], exact);
    start = piece.start + piece.pixels;
    piece.start += origin;
    pieces->push_back(piece);
  }
}

// Returns the pixels of the widest of those pieces.
inline int64_t WidestPiece(const Weight& weight, int64_t length) {
  struct Widest {
    void push_back(const Piece& piece) { width = std::max(width, piece.width); }
    int64_t width = 0;
  } widest;
  Cut(weight, 0, length, false, &widest);
  return widest.width;
}

}  // namespace slrc
