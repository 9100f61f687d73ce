// The choice of how a convolution's tiles read its input.
//
// On a zero-padded plane every tap of the kernel is one constant offset, so there is no im2col. A stride of s splits
// the plane into phases: phase f holds the padded rows (columns) f, f + s, f + 2 s, ..., and tap k reads phase k d mod
// s at k d / s, one element for each output. Rows follow each other at a pitch that lets the right padding of one be
// the left padding of the next, and outputs are computed on the flat plane: the few at the seams are thrown away.
//
// Whether it is worth making depends on the instruction set. Wide vectors are fast enough on planes. Narrow ones would
// wait: what a tile reads may be more than the first-level cache holds, each row on lines of its own. So if enough
// block rows follow to repay it, it is copied side by side; otherwise input channels are cut into slices (see
// conv_layout.cpp).
#include <unistd.h>

#include <algorithm>

#include "conv_layout.h"

namespace slrc {
namespace {

constexpr int64_t kLeastCache = 512 * 1024;    // second level, in bytes
constexpr double kRepaysCopy = 0.6;            // surviving values of an input channel, for each float of its copy:
constexpr double kRepaysRows = 3.5;            // if it is one run, and if it is several rows
constexpr double kRepaysPlane = 6;      // saved multiply-adds of vectors, for each vector of a kernel column's plane
constexpr double kLeastDensity = 0.15;  // of fewer columns most of several rows' copy would stay unread
constexpr int64_t kPlacesRead = 4 * 1024;      // of kTileReads, in place: channels are pages apart
constexpr int64_t kPanelChannels = 16;         // of groups of fewer, which share a panel,
constexpr int64_t kPanelFloats = 4 * 1024;     // and of their input
constexpr int64_t kMostTaps = 49;              // of masked lanes

// Of input, in one band: what leaves room in the cache for weights and outputs.
int64_t BandFloats() { return CacheFloats() / 4 * 3; }

// The input of one size, before anything is chosen.
struct Image {
  Image(const SlrcWindow& window, const int64_t x_shape[4])
      : rows(window, 0, x_shape[2]), columns(window, 1, x_shape[3]), channels(x_shape[1]) {
    CheckInput(window, x_shape);
    per_group = channels / window.group;
    pointwise = rows.kernel * columns.kernel == 1;
    for (const Axis* axis : {&rows, &columns})
      pointwise = pointwise && axis->stride == 1 && axis->pad == 0 && axis->out == axis->in;
  }
  int64_t Pixels() const { return rows.in * columns.in; }
  int64_t Taps() const { return rows.kernel * columns.kernel; }

  Axis rows, columns;
  int64_t channels, per_group;
  bool pointwise;  // the input is the plane: a 1x1 kernel of stride 1 without padding
};

void CheckLargestColumn(const Weight& weight, const Image& image) {
  const int64_t columns = image.per_group * image.Taps();
  if (weight.largest_column >= columns)
    throw Error("column " + std::to_string(weight.largest_column) + " is out of range: the window has " +
                std::to_string(columns) + " on an input of " + std::to_string(image.channels) + " channels");
}

// Groups of few channels, as of a depthwise convolution, share a panel: they are computed as if they were one group
// whose block rows each read their own part of the input.
int64_t PanelGroups(const Weight& weight, int64_t per_group, int64_t pixels, int64_t most_channels) {
  if (weight.out_channels / weight.group % weight.block) return 1;  // block rows that they do not fill
  const int64_t channels = std::min({kPanelChannels, kPanelFloats / pixels, most_channels});
  return std::clamp<int64_t>(channels / std::max<int64_t>(1, per_group), 1, weight.group);
}

// Surviving values that multiply an input channel.
double ValuesPerChannel(const Weight& weight, const Image& image) {
  return weight.Surviving() / static_cast<double>(weight.group * image.per_group);
}

// Whether outputs have the input's size, tiles can leave out lanes, and the input stays cached.
bool TakesMasks(const Weight& weight, const SlrcWindow& window, const Image& image) {
  bool keeps_size = true;
  for (int axis = 0; axis < 2; ++axis)
    keeps_size = keeps_size && window.strides[axis] == 1 &&
                 window.pads[axis] + window.pads[axis + 2] == (window.kernel[axis] - 1) * window.dilations[axis];
  return keeps_size && weight.loops->masks && weight.block > 1 && weight.sorted && image.Taps() > 1 &&
         image.Taps() <= kMostTaps && image.Pixels() >= Loops().lanes &&
         image.per_group * image.Pixels() <= CacheFloats() / 2;
}

// Whether a plane for each kernel column, which has no seams, saves more than it costs, and there is room for all at
// once.
bool RepaysColumnPlanes(const Weight& weight, const Image& image, const Axis& alone, int64_t panel_channels) {
  const Axis &rows = image.rows, &columns = image.columns;
  const double saved = ValuesPerChannel(weight, image) * static_cast<double>(columns.pitch - columns.out);
  const int64_t phases = static_cast<int64_t>(rows.phases.size() * alone.phases.size());
  const int64_t read = Product(phases, (rows.out + rows.reach) * alone.pitch);
  return ReadsPlanes() && saved >= kRepaysPlane * static_cast<double>(columns.kernel * columns.out) &&
         Product(panel_channels, read) <= BandFloats();
}

// Whether enough block rows read a tile to repay its copy.
bool RepaysTiles(const Weight& weight, const Image& image, int64_t widest, int64_t tile_floats) {
  if (image.pointwise && image.Pixels() < Loops().lanes) return image.Pixels() > 2;  // a vector reads past the input
  const int64_t read = image.per_group * TileReads(image.rows, image.columns, widest);
  if (ReadsPlanes() || read <= (image.pointwise ? kPlacesRead : kTileReads)) return false;
  const double values = ValuesPerChannel(weight, image);
  if (image.Taps() == 1) return values >= kRepaysCopy * static_cast<double>(tile_floats);
  const double density = values / static_cast<double>(weight.rows_per_group * weight.block * image.Taps());
  return density >= kLeastDensity && values >= kRepaysRows * static_cast<double>(tile_floats);
}

// The output rows of a band: as many as their planes leave room for, and of all bands about the same.
int64_t BandRows(const Axis& rows, const Axis& columns, int64_t pitch, int64_t panel_channels) {
  const int64_t phases = static_cast<int64_t>(rows.phases.size() * columns.phases.size());
  const int64_t row_floats = Product(Product(panel_channels, phases), pitch);
  const int64_t fitting = std::max<int64_t>(1, BandFloats() / std::max<int64_t>(1, row_floats) - rows.reach);
  return CeilDiv(rows.out, CeilDiv(rows.out, fitting));
}

}  // namespace

int64_t CacheFloats() {
#if defined(_SC_LEVEL2_CACHE_SIZE)  // not of every C library
  static const int64_t cache = std::max<int64_t>(kLeastCache, sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
  static const int64_t cache = kLeastCache;
#endif
  return cache / static_cast<int64_t>(sizeof(float));
}

bool ReadsPlanes() { return Loops().lanes > 8; }

int64_t TapOrder(const SlrcWindow& window, int32_t column) {
  const int64_t tap = column % (window.kernel[0] * window.kernel[1]);
  return tap % window.kernel[1] * window.kernel[0] + tap / window.kernel[1];
}

Geometry ChooseGeometry(const Weight& weight, const SlrcWindow& window, const int64_t x_shape[4]) {
  const Image image(window, x_shape);
  CheckLargestColumn(weight, image);
  const Axis &rows = image.rows, &columns = image.columns;
  Geometry chosen{Reading::kPlane, rows, columns, image.channels, image.per_group, 1, rows.out, {}};
  chosen.panel_groups =
      PanelGroups(weight, image.per_group, image.Pixels(), kMostInput / MostPlaneFloats(window, x_shape));
  const auto in_place = [&](Reading reading) {
    chosen.reading = reading;
    chosen.store = {columns.in, image.Pixels(), {}};
    return chosen;
  };
  const auto on_planes = [&](Reading reading) {
    chosen.reading = reading;
    const int64_t pitch = PlanePitch(reading, chosen.columns);
    chosen.band_rows = BandRows(rows, chosen.columns, pitch, chosen.PanelChannels());
    chosen.store = StorePlanes(reading, rows, chosen.columns, chosen.band_rows);
    return chosen;
  };

  if (TakesMasks(weight, window, image)) return in_place(Reading::kMasked);
  if (const Axis alone(window, 1, x_shape[3], true); RepaysColumnPlanes(weight, image, alone, chosen.PanelChannels())) {
    chosen.columns = alone;
    return on_planes(Reading::kColumnPlanes);
  }
  if (weight.block == 1 && !image.pointwise && columns.pitch != columns.out) return on_planes(Reading::kRows);
  const int64_t widest = WidestTile(weight, rows, columns);
  Store tiles = StoreTiles(rows, columns, widest, image.pointwise);
  if (RepaysTiles(weight, image, widest, tiles.floats)) {
    chosen.reading = Reading::kTiles;
    chosen.store = std::move(tiles);
    return chosen;
  }
  return image.pointwise ? in_place(Reading::kPointwise) : on_planes(Reading::kPlane);
}

}  // namespace slrc
