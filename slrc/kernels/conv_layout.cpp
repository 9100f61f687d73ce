// What follows from a convolution's geometry: where tiles find each column, and how the work is cut.
#include "conv_layout.h"

#include <algorithm>

namespace slrc {
namespace {

constexpr int64_t kCopiedFloats = 24 * 1024;    // of tiles copied at a time
constexpr int64_t kTogetherFloats = 24 * 1024;  // of copied tiles that a block row runs on before the next one
constexpr int64_t kMostCopied = 8;              // tiles at a time
constexpr int64_t kLeastBlocks = 32;            // of a block row, in a slice: it also loads and stores the sums

// From where a tile stands in a channel of the store, to what each tap reads there.
std::vector<int32_t> TapOffsets(const Geometry& g, const SlrcWindow& window) {
  std::vector<int32_t> offsets;
  for (int64_t kh = 0; kh < g.rows.kernel; ++kh)
    for (int64_t kw = 0; kw < g.columns.kernel; ++kw) {
      if (IsInPlace(g.reading)) {
        const int64_t down = kh * window.dilations[0] - window.pads[0];
        const int64_t right = kw * window.dilations[1] - window.pads[1];
        offsets.push_back(static_cast<int32_t>(down * g.store.pitch + right));
        continue;
      }
      const int64_t index = g.rows.PhaseIndex(kh) * static_cast<int64_t>(g.columns.phases.size());
      const Phase& phase = g.store.phases[index + g.columns.PhaseIndex(kw)];
      offsets.push_back(
          static_cast<int32_t>(phase.at + g.rows.Shift(kh) * phase.pitch + g.columns.Shift(kw)));
    }
  return offsets;
}

std::vector<int32_t> ColumnOffsets(const Geometry& g, const Weight& weight, const SlrcWindow& window) {
  const std::vector<int32_t> of_tap = TapOffsets(g, window);
  const int64_t taps = g.Taps();
  std::vector<int32_t> offsets;
  offsets.reserve(weight.columns.size());
  for (int64_t r = 0, t = 0; r < weight.BlockRows(); ++r) {
    const int64_t first_channel = r / weight.rows_per_group % g.panel_groups * g.per_group;
    for (; t < weight.row_pointers[r + 1]; ++t) {
      const int32_t column = weight.columns[t];
      offsets.push_back(static_cast<int32_t>((first_channel + column / taps) * g.store.floats) + of_tap[column % taps]);
    }
  }
  return offsets;
}

// Up to where the surviving blocks of each tap stand in each block row of a weight in the order of its taps.
std::vector<int32_t> TapEnds(const Geometry& g, const Weight& weight, const SlrcWindow& window) {
  std::vector<int32_t> ends;
  if (g.reading != Reading::kMasked) return ends;
  for (int64_t r = 0; r < weight.BlockRows(); ++r)
    for (int64_t t = 0, end = weight.row_pointers[r]; t < g.Taps(); ++t) {
      while (end < weight.row_pointers[r + 1] && TapOrder(window, weight.columns[end]) == t) ++end;
      ends.push_back(static_cast<int32_t>(end));
    }
  return ends;
}

// Narrow vectors on a plane whose tiles read more than the first-level cache holds: the input channels are cut into
// slices that fit, and all outputs go on from slice to slice.
SliceTable CutSlices(const Geometry& g, const Weight& weight) {
  SliceTable slices;
  const bool on_plane = g.reading == Reading::kPlane || g.reading == Reading::kColumnPlanes;
  if (!on_plane || ReadsPlanes() || !weight.sorted) return slices;
  const int64_t read = g.per_group * TileReads(g.rows, g.columns, WidestTile(weight, g.rows, g.columns));
  const int64_t most = static_cast<int64_t>(weight.columns.size()) / weight.BlockRows() / kLeastBlocks;
  const int64_t count = std::min({CeilDiv(read, kTileReads), most, g.per_group});
  if (count < 2) return slices;
  slices.count = count;
  const auto begin = weight.columns.begin();
  for (int64_t k = 0; k <= count; ++k) {
    const int64_t first_column = k * g.per_group / count * g.Taps();
    for (int64_t r = 0; r < weight.BlockRows(); ++r) {
      const auto end = begin + weight.row_pointers[r + 1];
      const auto start = std::lower_bound(begin + weight.row_pointers[r], end, first_column);
      slices.starts.push_back(static_cast<int32_t>(start - begin));
    }
  }
  return slices;
}

// Whether each block row holds all taps of one channel and nothing else: then those of each kernel row are alike.
bool HoldsWindows(const Weight& weight, int64_t taps) {
  for (int64_t r = 0; r < weight.BlockRows(); ++r) {
    const int32_t* const columns = weight.columns.data() + weight.row_pointers[r];
    if (weight.row_pointers[r + 1] - weight.row_pointers[r] != taps || columns[0] % taps) return false;
    for (int64_t tap = 1; tap < taps; ++tap)
      if (columns[tap] != columns[0] + tap) return false;
  }
  return true;
}

int64_t WindowParts(const Geometry& g, const Weight& weight) {
  const Axis& rows = g.rows;
  const bool alike = g.reading == Reading::kRows && rows.kernel == kParts && rows.stride == 1 && rows.dilation == 1;
  return alike && HoldsWindows(weight, g.Taps()) ? kParts : 1;
}

// The columns that any row has, in the order of those that are there.
std::vector<int32_t> AllColumns(const Geometry& g, const Weight& weight, const SlrcWindow& window) {
  std::vector<std::pair<int64_t, int32_t>> keyed;
  for (const int32_t c : weight.columns) keyed.emplace_back(WantsTapOrder(g.reading) ? TapOrder(window, c) : 0, c);
  std::sort(keyed.begin(), keyed.end());
  keyed.erase(std::unique(keyed.begin(), keyed.end()), keyed.end());
  std::vector<int32_t> columns;
  for (const auto& [order, column] : keyed) columns.push_back(column);
  return columns;
}

// Whether matrix registers, which multiply the zeros too, are faster by a fifth. What either takes for a vector of
// pixels, in about nanoseconds of a Sapphire Rapids.
bool IsFasterByMatrix(const Geometry& g, const Weight& weight, int64_t columns) {
  constexpr double kColumn = 1, kProduct = 16, kValues = 20, kResults = 12, kBlockOfEight = 1.8;
  const double vectors = static_cast<double>(CeilDiv(g.rows.out * g.columns.out, weight.loops->lanes));
  const double groups = static_cast<double>(CeilDiv(weight.out_channels, kMatrixRows));
  const double products = static_cast<double>(ProductsOf(columns));
  const double each = products * (kProduct + kValues / vectors) + kResults;
  return 1.2 * (kColumn * static_cast<double>(columns) + groups * each) < kBlockOfEight * weight.Surviving() / 8;
}

MatrixTable MakeMatrix(const Geometry& g, const Weight& weight, const SlrcWindow& window, bool sliced) {
  MatrixTable table;
  if (!weight.loops->matrix || weight.block < 8 || weight.group > 1 || sliced) return table;
  const std::vector<int32_t> columns = AllColumns(g, weight, window);
  const int64_t count = static_cast<int64_t>(columns.size()), products = ProductsOf(count);
  if (!IsFasterByMatrix(g, weight, count)) return table;
  const std::vector<int32_t> of_tap = TapOffsets(g, window);
  std::vector<int64_t> place(weight.largest_column + 1);
  for (int64_t k = 0; k < count; ++k) {
    place[columns[k]] = k;
    const int64_t channel = columns[k] / g.Taps();
    table.offsets.push_back(static_cast<int32_t>(channel * g.store.floats) + of_tap[columns[k] % g.Taps()]);
  }
  for (int64_t t = 0, end = 0; WantsTapOrder(g.reading) && t < g.Taps(); ++t) {
    while (end < count && TapOrder(window, columns[end]) == t) ++end;
    table.tap_ends.push_back(static_cast<int32_t>(end));
  }
  table.values.resize(RoundUp(weight.BlockRows() * weight.block, kMatrixRows) * products);
  for (int64_t r = 0; r < weight.BlockRows(); ++r)
    for (int64_t t = weight.row_pointers[r]; t < weight.row_pointers[r + 1]; ++t)
      for (int64_t i = 0; i < weight.block; ++i) {
        const int64_t row = r * weight.block + i, k = place[weight.columns[t]];
        const int64_t matrix = row / kMatrixRows * products + k / kMatrixColumns;
        table.values[matrix * kMatrixRows + row % kMatrixRows].words[k % kMatrixColumns] =
            weight.values[t * weight.block + i];
      }
  return table;
}

// The floats of one piece's copy, of all channels of a panel.
int64_t TileFloats(const Geometry& g) { return std::max<int64_t>(1, g.PanelChannels() * g.store.floats); }

Bands CutBands(const Geometry& g, const PieceTable& table) {
  if (g.reading != Reading::kTiles) return {g.band_rows, CeilDiv(g.rows.out, g.band_rows)};
  const int64_t size = std::clamp<int64_t>(kCopiedFloats / TileFloats(g), 1, kMostCopied);
  return {size, CeilDiv(static_cast<int64_t>(table.pieces.size()), size)};
}

// None if the last band's are those of the others.
PieceTable LastPieces(const Geometry& g, const Weight& weight, const SlrcWindow& window, bool sliced) {
  const int64_t height = (g.rows.out - 1) % g.band_rows + 1;
  return height == g.band_rows ? PieceTable() : CutPieces(g, weight, window, sliced, height);
}

Copies PlanCopies(const Geometry& g, const PieceTable& table, const Bands& bands) {
  if (IsInPlace(g.reading)) return {};
  return g.reading == Reading::kTiles ? CopyTiles(g, table.pieces, bands) : CopyPlanes(g, bands);
}

}  // namespace

Layout::Layout(const Geometry& chosen, std::shared_ptr<const Weight> in_order, const SlrcWindow& window)
    : geometry(chosen),
      weight(std::move(in_order)),
      offsets(ColumnOffsets(geometry, *weight, window)),
      tap_ends(TapEnds(geometry, *weight, window)),
      slices(CutSlices(geometry, *weight)),
      parts(WindowParts(geometry, *weight)),
      pieces(CutPieces(geometry, *weight, window, slices.count > 1, geometry.band_rows)),
      bands(CutBands(geometry, pieces)),
      last_pieces(LastPieces(geometry, *weight, window, slices.count > 1)),
      together(geometry.reading == Reading::kTiles ? kTogetherFloats / TileFloats(geometry)
                                                   : static_cast<int64_t>(pieces.pieces.size())),
      copies(PlanCopies(geometry, pieces, bands)),
      matrix(MakeMatrix(geometry, *weight, window, slices.count > 1)) {}

const std::vector<Piece>& Layout::PiecesOf(int64_t band) const {
  const bool other = band + 1 == bands.count && !last_pieces.pieces.empty();
  return other ? last_pieces.pieces : pieces.pieces;
}

Slices Layout::WeightSlices() const {
  return slices.count > 1 ? Slices{slices.starts.data(), slices.count, weight->BlockRows()} : OneSlice(*weight);
}

int64_t Layout::Slack() const {
  return kMaxLanes + (geometry.reading == Reading::kTiles ? 0 : geometry.columns.lead + kMaxTilePixels);
}

void Layout::Copy(const float* x, int64_t readable, int64_t band, int64_t count, float* to) const {
  const Geometry& g = geometry;
  const CopyRun* const runs = copies.runs.data() + copies.begins[band];
  const bool tiled = g.reading == Reading::kTiles;
  Loops().copy({runs, static_cast<int64_t>(copies.begins[band + 1] - copies.begins[band]), x, readable,
                g.columns.stride, g.rows.in * g.columns.in, g.store.floats, to, count, tiled, weight->padding});
  if (!tiled) std::fill_n(to + count * g.store.floats, Slack(), weight->padding);
}

}  // namespace slrc
