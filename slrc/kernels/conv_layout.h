// How a convolution of one input size is computed: how its tiles read the input, where they find each column, how the
// outputs are cut into pieces, and what is copied first. All of it is decided once for a size; README.md draws the
// words.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "panel.h"
#include "window.h"

namespace slrc {

// Floats of input that a tile may read without waiting: what leaves room for the weights in the first-level cache.
constexpr int64_t kTileReads = 7 * 1024;

// How tiles read the input: where it is, or copied to scratch memory first.
enum class Reading {
  kPointwise,     // in place: of a 1x1 kernel of stride 1 without padding the input is the plane
  kMasked,        // in place: outputs have the input's size, and lanes that would be padding are left out
  kPlane,         // a zero-padded plane, in phases, whose rows are `pitch` apart: pieces cross its seams
  kColumnPlanes,  // a plane for each kernel column, of just what that column reads: no seams
  kRows,          // a plane of rows that begin with whole vectors; pieces of one row, repeated on the others (block 1)
  kTiles,         // what each tile reads, side by side; the plane itself is never made
};

inline bool IsInPlace(Reading reading) { return reading == Reading::kPointwise || reading == Reading::kMasked; }

// What all taps of one row phase and one column phase read, and where it stands in a channel of a Store.
struct Phase {
  AxisPhase row, column;
  int64_t at = 0, pitch = 0;  // where its first element is, and its rows' distance
  bool apart = false;         // whether a tile has each row copied for itself
};

// What tiles read of a channel: its plane, or, of kTiles, what one piece reads of it.
struct Store {
  int64_t pitch;              // of the flat plane from which pieces are cut: its rows' distance
  int64_t floats;             // of a channel
  std::vector<Phase> phases;  // none in place
  int64_t widest = 0;         // of kTiles: the pixels of the widest piece
};

// How the input of one size is read.
struct Geometry {
  // Whether outputs that follow each other on the flat plane do so in y.
  bool IsSeamless() const { return store.pitch == columns.out; }
  int64_t PanelChannels() const { return panel_groups * per_group; }
  int64_t Taps() const { return rows.kernel * columns.kernel; }

  Reading reading;
  Axis rows, columns;
  int64_t channels, per_group;
  int64_t panel_groups;  // share a panel, as if they were one group; the last panel may hold fewer
  int64_t band_rows;     // output rows whose plane is made at once; all of them where none is made
  Store store;
};

// Pieces, and what they point to.
struct PieceTable {
  std::vector<Piece> pieces;
  std::deque<Outputs> outputs;
  std::deque<std::vector<TapLanes>> tap_lanes;
};

// The runs that are copied for each band: those of band b are runs[begins[b]] ... runs[begins[b + 1] - 1].
struct Copies {
  std::vector<CopyRun> runs;
  std::vector<size_t> begins;
};

// Surviving blocks cut into slices of neighbouring channels, see Slices; no `starts` if there is one slice.
struct SliceTable {
  int64_t count = 1;
  std::vector<int32_t> starts;
};

// What a MatrixWeight points to; no offsets where vectors are faster.
struct MatrixTable {
  MatrixWeight View() const {
    return {static_cast<int64_t>(offsets.size()), offsets.data(), tap_ends.data(), values.data()};
  }

  std::vector<int32_t> offsets, tap_ends;
  std::vector<MatrixRow> values;
};

// What is computed on one copy of the input: `size` output rows of a plane, or pieces of kTiles.
struct Bands {
  int64_t size, count;
};

// All that a run of the convolution on an input of one size looks up.
struct Layout {
  Layout(const Geometry& geometry, std::shared_ptr<const Weight> weight, const SlrcWindow& window);
  Layout(const Layout&) = delete;

  Slices WeightSlices() const;
  const std::vector<Piece>& PiecesOf(int64_t band) const;  // of kTiles those of all bands
  // Floats after the last channel of a copy: a tile may read up to a vector past the last pixel.
  int64_t Slack() const;
  // Copies `count` channels of a band to `to`; `readable` floats stand from x on.
  void Copy(const float* x, int64_t readable, int64_t band, int64_t count, float* to) const;

  const Geometry geometry;
  const std::shared_ptr<const Weight> weight;  // in the order that the reading wants
  const std::vector<int32_t> offsets;          // for each surviving block: where a tile finds its column
  const std::vector<int32_t> tap_ends;         // of kMasked, see Strip
  const SliceTable slices;
  const int64_t parts;    // of kRows: kParts if the taps of all kernel rows are alike; else 1
  const PieceTable pieces;       // of a band; of kTiles those of all bands
  const Bands bands;
  const PieceTable last_pieces;  // of the last band, if it has fewer rows
  const int64_t together;        // see Panel
  const Copies copies;
  const MatrixTable matrix;
};

// Floats of the second-level cache.
int64_t CacheFloats();
// Whether tiles of this instruction set are fast enough on planes as they are.
bool ReadsPlanes();

// conv_geometry.cpp: the choice of a reading, by what it costs and what it saves.
Geometry ChooseGeometry(const Weight& weight, const SlrcWindow& window, const int64_t x_shape[4]);
// Whether the reading wants the columns of each block row in the order of TapOrder. The others want those of one
// channel together, since they read the same lines.
inline bool WantsTapOrder(Reading reading) { return reading == Reading::kMasked; }
// Where a column's tap stands among all: by kernel column, since of most pieces those of one read the same lanes.
int64_t TapOrder(const SlrcWindow& window, int32_t column);

// conv_store.cpp: where a channel's parts stand.
std::vector<Phase> PhasesRead(const Axis& rows, const Axis& columns);
int64_t WidestTile(const Weight& weight, const Axis& rows, const Axis& columns);
// The floats that a tile of `widest` pixels reads of a plane's channel, with half a cache line on each side of a row.
int64_t TileReads(const Axis& rows, const Axis& columns, int64_t widest);
Store StoreTiles(const Axis& rows, const Axis& columns, int64_t widest, bool pointwise);
Store StorePlanes(Reading reading, const Axis& rows, const Axis& columns, int64_t band_rows);
// Of a plane, the floats before what its first row takes from the input: of kRows whole vectors.
int64_t Room(Reading reading, int64_t first);
int64_t PlanePitch(Reading reading, const Axis& columns);

// conv_pieces.cpp: the pieces that `height` output rows are cut into.
PieceTable CutPieces(const Geometry& geometry, const Weight& weight, const SlrcWindow& window, bool sliced,
                     int64_t height);

// conv_copies.cpp: what is copied before a band is computed.
Copies CopyTiles(const Geometry& geometry, const std::vector<Piece>& pieces, const Bands& bands);
Copies CopyPlanes(const Geometry& geometry, const Bands& bands);

}  // namespace slrc
