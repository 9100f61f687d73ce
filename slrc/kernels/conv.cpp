// Convolution. A task computes some block rows on a panel: a band of one image's outputs, in one group or some small
// ones. It first copies what the band reads to its thread's scratch memory, unless the input is read in place (see
// Reading).
#include "conv.h"

#include <algorithm>

#include "conv_layout.h"

namespace slrc {
namespace {

constexpr size_t kLayoutsKept = 8;

// The outputs of a band on a flat plane: pixel p is row p / pitch, column p % pitch.
struct PlaneOutput {
  static constexpr bool kMoreApart = false;
  float* y;  // the band's first row in the image's first channel
  const float* residual;
  int64_t channel_stride, width, pitch;
  bool may_stand_out = false;  // rows over the next ones, which are written later

  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    const int64_t row = piece.start / pitch, column = piece.start % pitch;
    const int64_t at = channel * channel_stride + row * width + std::min(column, width);
    *place = {y + at, residual ? residual + at : nullptr, channel_stride, width, 1, nullptr};
    if (column + piece.width <= width || (may_stand_out && piece.repeats > 1)) return true;
    place->outputs = piece.outputs;
    return piece.outputs;
  }

  // Calls copy(where in y, where in the tile, how many) for each run of pixels that are outputs.
  template <class Copy>
  void ForRuns(const Piece& piece, const Copy& copy) const {
    int64_t row = piece.start / pitch, column = piece.start % pitch;
    for (int64_t r = 0; piece.repeats > 1 && r < piece.repeats; ++r)
      copy((row + r) * width + column, r * piece.width, piece.pixels);
    for (int64_t p = 0; piece.repeats == 1 && p < piece.pixels; p += pitch - column, column = 0, ++row)
      if (column < width) copy(row * width + column, p, std::min(width - column, piece.pixels - p));
  }

  void Gather(int64_t channel, int64_t channels, const Piece& piece, float* sums) const {
    ForRuns(piece, [&](int64_t at, int64_t p, int64_t count) {
      Loops().copy_rows(residual + channel * channel_stride + at, channel_stride, channels, count, sums + p,
                        piece.repeats * piece.width);
    });
  }

  void Scatter(int64_t channel, int64_t channels, const Piece& piece, const float* sums) const {
    ForRuns(piece, [&](int64_t at, int64_t p, int64_t count) {
      Loops().copy_rows(sums + p, piece.repeats * piece.width, channels, count, y + channel * channel_stride + at,
                        channel_stride);
    });
  }
};

// One call of Conv::Run: what its tasks have in common.
struct ConvRun {
  const Layout& l;
  const Geometry& g;
  const float* x;
  int64_t images;
  const float* residual;
  float* y;
  uint64_t owner;  // of scratch memory, see Scratch::Get

  int64_t InPlane() const { return g.rows.in * g.columns.in; }
  int64_t OutPlane() const { return g.rows.out * g.columns.out; }
  int64_t GroupPanels() const { return CeilDiv(l.weight->group, g.panel_groups); }
  // A panel for each image, groups that share one, and band, in this order.
  int64_t Panels() const { return images * GroupPanels() * l.bands.count; }

  void Compute(int64_t index, int64_t first, int64_t last) const;

 private:
  Panel PanelOf(int64_t band) const;
  const float* CopyInput(int64_t index, const float* from, int64_t channels, int64_t pieces) const;
  PlaneOutput OutputOf(int64_t image, int64_t band) const;
};

Panel ConvRun::PanelOf(int64_t band) const {
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
  panel.far = IsInPlace(g.reading) && ReadsPlanes() && g.per_group * InPlane() > CacheFloats() / 2;
  return panel;
}

// Returns the copy of a panel's input in the thread's scratch memory, made unless it is there already.
const float* ConvRun::CopyInput(int64_t index, const float* from, int64_t channels, int64_t pieces) const {
  bool fresh;
  const int64_t copies = g.reading == Reading::kTiles ? pieces : 1;
  const int64_t floats = copies * g.PanelChannels() * g.store.floats + l.Slack();
  float* const copied = Scratch::Inputs().Get(floats, owner, index, &fresh);
  const int64_t readable = x + images * g.channels * InPlane() - from;
  if (fresh) l.Copy(from, readable, index % l.bands.count, channels, copied);
  return copied;
}

PlaneOutput ConvRun::OutputOf(int64_t image, int64_t band) const {
  int64_t offset = image * l.weight->out_channels * OutPlane(), rows = g.rows.out;
  if (g.reading != Reading::kTiles) {  // whose pieces say where they are in the whole plane
    offset += band * g.band_rows * g.columns.out;
    rows = std::min(g.band_rows, rows - band * g.band_rows);
  }
  // Without seams a task's pixels are one row: a tile that stands out past them is not written in place.
  const bool seamless = g.IsSeamless();
  return {y + offset, residual ? residual + offset : nullptr, OutPlane(),
          seamless ? rows * g.columns.out : g.columns.out, seamless ? OutPlane() : g.store.pitch};
}

// Computes block rows [first, last) of those of a panel's groups.
void ConvRun::Compute(int64_t index, int64_t first, int64_t last) const {
  const Weight& weight = *l.weight;
  const int64_t band = index % l.bands.count, image = index / l.bands.count / GroupPanels();
  const int64_t group = index / l.bands.count % GroupPanels() * g.panel_groups;
  const int64_t groups = std::min(g.panel_groups, weight.group - group);
  const int64_t begin = group * weight.rows_per_group + first;
  const int64_t end = std::min(group * weight.rows_per_group + last, (group + groups) * weight.rows_per_group);
  if (begin >= end) return;  // the last groups are fewer

  Panel panel = PanelOf(band);
  panel.x = x + (image * g.channels + group * g.per_group) * InPlane();
  if (!IsInPlace(g.reading)) panel.x = CopyInput(index, panel.x, groups * g.per_group, panel.count);
  PlaneOutput output = OutputOf(image, band);
  const bool one_band = g.reading == Reading::kRows && l.bands.count == 1;
  output.may_stand_out = one_band && IsCheap(weight.activation) && end - begin > 1;
  // The last channel's rows may not stand out: what follows is another task's.
  RunPanel(weight, begin, output.may_stand_out ? end - 1 : end, panel, output);
  if (!output.may_stand_out) return;
  output.may_stand_out = false;
  RunPanel(weight, end - 1, end, panel, output);
}

}  // namespace

Conv::Conv(const SlrcBlocks& blocks, const SlrcWindow& window)
    : window_(window),
      out_channels_(blocks.out_channels),
      by_channel_(std::make_shared<const Weight>(blocks, window.group)) {
  CheckWindow(window);
}

Conv::~Conv() = default;

void Conv::OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const {
  y_shape[0] = x_shape[0];
  y_shape[1] = out_channels_;
  for (int axis = 0; axis < 2; ++axis) y_shape[2 + axis] = OutputSize(window_, axis, x_shape[2 + axis]);
}

// Only a weight whose columns rise is sorted by tap (see ChooseGeometry), so either order gives the other one back.
std::shared_ptr<const Weight> Conv::WeightInOrder(bool by_tap) const {
  if (by_tap && !by_tap_)
    by_tap_ = std::make_shared<const Weight>(
        by_channel_->SortedBy([this](int32_t column) { return TapOrder(window_, column); }));
  if (!by_tap && !by_channel_)
    by_channel_ = std::make_shared<const Weight>(by_tap_->SortedBy([](int32_t column) { return column; }));
  return by_tap ? by_tap_ : by_channel_;
}

std::shared_ptr<const Layout> Conv::FindLayout(const int64_t x_shape[4]) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& layout : layouts_) {
    const Geometry& g = layout->geometry;
    if (g.channels == x_shape[1] && g.rows.in == x_shape[2] && g.columns.in == x_shape[3]) return layout;
  }
  const Geometry geometry = ChooseGeometry(by_channel_ ? *by_channel_ : *by_tap_, window_, x_shape);
  auto weight = WeightInOrder(WantsTapOrder(geometry.reading));
  auto made = std::make_shared<const Layout>(geometry, std::move(weight), window_);
  if (layouts_.size() == kLayoutsKept) layouts_.erase(layouts_.begin());
  layouts_.push_back(made);
  for (auto* order : {&by_channel_, &by_tap_}) {
    const auto uses = [order](const auto& layout) { return layout->weight == *order; };
    if (std::none_of(layouts_.begin(), layouts_.end(), uses)) order->reset();
  }
  return made;
}

void Conv::Run(const float* x, const int64_t x_shape[4], const float* residual, float* y,
               const Parallel& parallel) const {
  const std::shared_ptr<const Layout> layout = FindLayout(x_shape);
  const Weight& weight = *layout->weight;
  const ConvRun run{*layout, layout->geometry, x, x_shape[0], residual, y, NewOwner()};
  const double work = static_cast<double>(weight.values.size()) * run.OutPlane() * x_shape[0];
  RunTasks(parallel, run.Panels(), layout->geometry.panel_groups * weight.rows_per_group, 1, work,
           [&run](int64_t index, int64_t first, int64_t last) { run.Compute(index, first, last); });
}

}  // namespace slrc
