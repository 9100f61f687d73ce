// A run of a convolution, whatever its outputs are: conv.cpp and int8.cpp say what becomes of the sums.
#pragma once

#include <algorithm>

#include "conv.h"
#include "conv_layout.h"

namespace slrc {

constexpr double kMatrixSpeed = 4;      // of matrix registers, beside vectors
constexpr int64_t kPiecesTogether = 8;  // of a task by them

// The outputs of a band on a flat plane: pixel p is row p / pitch, column p % pitch.
struct PlanePlaces {
  static constexpr bool kMoreApart = false, kInParts = false;
  int64_t at;  // the band's first row in the image's first channel
  int64_t channel_stride, width, pitch;
  bool may_stand_out = false;  // rows over the next ones, which are written later

  // Calls copy(where in y, where in the tile, how many) for each run of pixels that are outputs.
  template <class Copy>
  void ForRuns(const Piece& piece, const Copy& copy) const {
    int64_t row = piece.start / pitch, column = piece.start % pitch;
    for (int64_t r = 0; piece.repeats > 1 && r < piece.repeats; ++r)
      copy(at + (row + r) * width + column, r * piece.width, piece.pixels);
    for (int64_t p = 0; piece.repeats == 1 && p < piece.pixels; p += pitch - column, column = 0, ++row)
      if (column < width) copy(at + row * width + column, p, std::min(width - column, piece.pixels - p));
  }
};

// One call of Conv::Run: what its tasks have in common. A task computes some block rows on a panel: a band of one image's
// outputs, in one group or some small ones; by matrix registers all block rows on some of its pieces. It first copies
// what the band reads to its thread's scratch memory, unless the input is read in place (see Reading).
// MakeOutput(places) is the Output of RunPanel.
template <class MakeOutput>
struct ConvRun {
  const Layout& l;
  const Geometry& g;
  const Word* x;
  int64_t images;
  const MakeOutput& make_output;
  uint64_t owner;  // of scratch memory, see Scratch::Get

  int64_t InPlane() const { return g.rows.in * g.columns.in; }
  int64_t OutPlane() const { return g.rows.out * g.columns.out; }
  int64_t GroupPanels() const { return CeilDiv(l.weight->group, g.panel_groups); }
  // A panel for each image, groups that share one, and band, in this order.
  int64_t Panels() const { return images * GroupPanels() * l.bands.count; }

  // Whether matrix registers multiply it, some pieces a task; else vectors do, some block rows a task.
  bool IsByMatrix() const { return !l.matrix.offsets.empty(); }
  int64_t MostPieces() const {
    const bool tiled = g.reading == Reading::kTiles;
    return tiled ? l.bands.size : static_cast<int64_t>(l.pieces.pieces.size());
  }
  void Compute(int64_t index, int64_t first, int64_t last) const;

 private:
  Panel PanelOf(int64_t band) const;
  const Word* CopyInput(int64_t index, const Word* from, int64_t channels, int64_t pieces) const;
  PlanePlaces PlacesOf(int64_t image, int64_t band) const;
};

template <class MakeOutput>
Panel ConvRun<MakeOutput>::PanelOf(int64_t band) const {
  const std::vector<Piece>& pieces = l.PiecesOf(band);
  Panel panel{nullptr, l.offsets.data(), l.WeightSlices(), pieces.data(), static_cast<int64_t>(pieces.size()), 0,
              l.together, g.store.pitch, l.parts};
  if (g.reading == Reading::kMasked) {
    panel.tap_ends = l.tap_ends.data();
    panel.taps = g.Taps();
  }
  if (g.reading == Reading::kTiles) {
    panel.pieces += band * l.bands.size;
    panel.count = std::min(l.bands.size, panel.count - band * l.bands.size);
    panel.step = g.PanelChannels() * g.store.floats;
  }
  panel.matrix = l.matrix.View();
  panel.far = IsInPlace(g.reading) && ReadsPlanes() && g.per_group * InPlane() > CacheFloats() / 2;
  return panel;
}

// Returns the copy of a panel's input in the thread's scratch memory, made unless it is there already.
template <class MakeOutput>
const Word* ConvRun<MakeOutput>::CopyInput(int64_t index, const Word* from, int64_t channels, int64_t pieces) const {
  bool fresh;
  const int64_t copies = g.reading == Reading::kTiles ? pieces : 1;
  const int64_t floats = copies * g.PanelChannels() * g.store.floats + l.Slack();
  Word* const copied = Scratch::Inputs().Get(floats, owner, index, &fresh);
  const int64_t readable = x + images * g.channels * InPlane() - from;
  if (fresh) l.Copy(from, readable, index % l.bands.count, channels, copied);
  return copied;
}

template <class MakeOutput>
PlanePlaces ConvRun<MakeOutput>::PlacesOf(int64_t image, int64_t band) const {
  int64_t offset = image * l.weight->out_channels * OutPlane(), rows = g.rows.out;
  if (g.reading != Reading::kTiles) {  // whose pieces say where they are in the whole plane
    offset += band * g.band_rows * g.columns.out;
    rows = std::min(g.band_rows, rows - band * g.band_rows);
  }
  // Without seams a task's pixels are one row: a tile that stands out past them is not written in place.
  const bool seamless = g.IsSeamless();
  return {offset, OutPlane(), seamless ? rows * g.columns.out : g.columns.out, seamless ? OutPlane() : g.store.pitch};
}

// Computes block rows [first, last) of those of a panel's groups, or all of them on these of its pieces.
template <class MakeOutput>
void ConvRun<MakeOutput>::Compute(int64_t index, int64_t first, int64_t last) const {
  const Weight& weight = *l.weight;
  const int64_t band = index % l.bands.count, image = index / l.bands.count / GroupPanels();
  const int64_t group = index / l.bands.count % GroupPanels() * g.panel_groups;
  const int64_t groups = std::min(g.panel_groups, weight.group - group);
  const int64_t begin = group * weight.rows_per_group + (IsByMatrix() ? 0 : first);
  const int64_t most = (group + groups) * weight.rows_per_group;
  const int64_t end = IsByMatrix() ? most : std::min(group * weight.rows_per_group + last, most);
  if (begin >= end) return;  // the last groups are fewer

  Panel panel = PanelOf(band);
  panel.x = x + (image * g.channels + group * g.per_group) * InPlane();
  if (!IsInPlace(g.reading)) panel.x = CopyInput(index, panel.x, groups * g.per_group, panel.count);
  if (IsByMatrix()) {
    last = std::min(last, panel.count);
    if (first >= last) return;  // the last band has fewer
    panel.pieces += first;
    panel.count = last - first;
    panel.x += first * panel.step;
  }
  PlanePlaces places = PlacesOf(image, band);
  const bool one_band = g.reading == Reading::kRows && l.bands.count == 1;
  places.may_stand_out = one_band && IsCheap(weight.activation) && end - begin > 1;
  // The last channel's rows may not stand out: what follows is another task's.
  RunPanel(weight, begin, places.may_stand_out ? end - 1 : end, panel, make_output(places));
  if (!places.may_stand_out) return;
  places.may_stand_out = false;
  RunPanel(weight, end - 1, end, panel, make_output(places));
}

template <class MakeOutput>
void Conv::Run(const Word* x, const int64_t x_shape[4], const MakeOutput& make_output,
               const Parallel& parallel) const {
  const std::shared_ptr<const Layout> layout = FindLayout(x_shape);
  const Weight& weight = *layout->weight;
  const ConvRun<MakeOutput> run{*layout, layout->geometry, x, x_shape[0], make_output, NewOwner()};
  const double work = weight.Surviving() * run.OutPlane() * x_shape[0];
  const auto compute = [&run](int64_t index, int64_t first, int64_t last) { run.Compute(index, first, last); };
  if (!run.IsByMatrix())
    return RunTasks(parallel, run.Panels(), run.g.panel_groups * weight.rows_per_group, 1, work, compute);
  RunTasks(parallel, run.Panels(), run.MostPieces(), kPiecesTogether, work / kMatrixSpeed, compute);
}

}  // namespace slrc
