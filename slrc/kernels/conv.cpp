// Convolution: on a zero-padded plane every tap of the kernel is one constant offset, so there is no im2col.
//
// A stride of s splits the plane into phases: phase f holds the padded rows (columns) f, f + s, f + 2 s, ..., and tap k
// reads phase k d mod s at k d / s, one element for each output. Rows follow each other at a pitch that lets the right
// padding of one be the left padding of the next, and outputs are computed on the flat plane: the few at the seams
// are thrown away, as a tile is stored if the instruction set can (AVX-512), else as it is copied to its place.
//
// Where outputs have the input's size, the input is such a plane but for its padding. If the instruction set can leave out
// lanes of a load (AVX-512) and the input stays in the second-level cache, it is read where it is: a block row's columns
// are put in the order of their taps, and for each tap a tile leaves out the lanes that would be padding.
//
// On a small plane the seams are many. If enough outputs share its cost, the plane is made once for each kernel column,
// of just the elements that this column reads: then there are none.
//
// An image is cut into bands of output rows whose plane fits the second-level cache; the task that computes a band makes
// its plane in the thread's scratch memory. The input of a 1x1 convolution of stride 1 is a plane already and is read as
// it is; if most of it is outside that cache, each tile prefetches what the next one reads. Wide vectors are fast enough
// on planes. Narrow ones would wait: what a tile reads may be more than the first-level cache holds, each row on lines of
// its own. So if enough block rows follow to repay it, it is copied from the input side by side, channel after channel,
// and the plane itself is never made; otherwise the input channels are cut into slices that fit the first level, all
// outputs going on from slice to slice.
//
// Groups of few channels, as of a depthwise convolution, share a panel: they are computed as if they were one group
// whose block rows each read their own part of the input. Blocks of one row have no rows to share what is loaded, so
// their tiles are cut from the rows of the image, the same pixels of several at a time, and never cross a seam; rows
// that begin with a whole vector then cost little room and spare stores across cache lines.
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <numeric>
#include <utility>

#include "panel.h"
#include "window.h"

namespace slrc {
namespace {

constexpr int64_t kLeastCache = 512 * 1024;    // second level, in bytes
constexpr int64_t kTilesFloats = 24 * 1024;    // of tiles copied at a time
constexpr int64_t kSliceFloats = 7 * 1024;     // of input that a tile reads in one slice; leaves room for the weights
constexpr int64_t kTogetherFloats = 6 * 1024;  // of copied tiles that a block row runs on before the next one
constexpr int64_t kLeastBlocks = 32;           // of a block row, in a slice: it also loads and stores the sums
constexpr double kRepaysCopy = 0.6;            // surviving values of an input channel, for each float of its copy:
constexpr double kRepaysRows = 3.5;            // if it is one run, and if it is several rows
constexpr double kRepaysPlane = 6;             // saved multiply-adds of vectors, for each vector of a kernel column's plane
constexpr double kLeastDensity = 0.15;         // of fewer columns most of several rows' copy would stay unread
constexpr int64_t kPanelChannels = 16;         // of groups of fewer, which share a panel,
constexpr int64_t kPanelFloats = 4 * 1024;     // and of their input
constexpr size_t kLayoutsKept = 8;

// Of the second-level cache.
int64_t CacheFloats() {
#if defined(_SC_LEVEL2_CACHE_SIZE)  // not of every C library
  static const int64_t cache = std::max<int64_t>(kLeastCache, sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
  static const int64_t cache = kLeastCache;
#endif
  return cache / static_cast<int64_t>(sizeof(float));
}

// Of input, in one band: what leaves room in the cache for weights and outputs.
int64_t BandFloats() { return CacheFloats() / 4 * 3; }

// Wide vectors read planes as they are.
bool ReadsPlanes() { return Loops().lanes > 8; }

// The outputs of a band on a plane with seams: flat pixel p is row p / pitch, column p % pitch.
struct SeamedOutput {
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

constexpr int64_t kMostTaps = 49;

// Where a column's tap stands among all: by kernel column, since of most pieces those of one read the same lanes.
int64_t TapOrder(const SlrcWindow& window, int32_t column) {
  const int64_t tap = column % (window.kernel[0] * window.kernel[1]);
  return tap % window.kernel[1] * window.kernel[0] + tap / window.kernel[1];
}

// Whether tiles can leave out lanes, and outputs have the input's size.
bool MayBeMasked(const Weight& weight, const SlrcWindow& window) {
  const int64_t taps = window.kernel[0] * window.kernel[1];
  bool keeps_size = Loops().masks && weight.block > 1 && taps > 1 && taps <= kMostTaps;
  for (int axis = 0; axis < 2; ++axis)
    keeps_size = keeps_size && window.strides[axis] == 1 &&
                 window.pads[axis] + window.pads[axis + 2] == (window.kernel[axis] - 1) * window.dilations[axis];
  return keeps_size;
}

// Returns the weight with the columns of each block row in the order of their taps. (Where a plane is copied, those of one
// channel stay together: they read the same lines.)
Weight SortedByTap(const SlrcWindow& window, const Weight& weight) {
  Weight by_tap = weight;
  std::vector<int32_t> order(weight.columns.size());
  std::iota(order.begin(), order.end(), 0);
  const auto tap_of = [&](int32_t t) { return TapOrder(window, weight.columns[t]); };
  for (size_t r = 0; r + 1 < weight.row_pointers.size(); ++r)
    std::stable_sort(order.begin() + weight.row_pointers[r], order.begin() + weight.row_pointers[r + 1],
                     [&](int32_t a, int32_t b) { return tap_of(a) < tap_of(b); });
  for (size_t t = 0; t < order.size(); ++t) {
    by_tap.columns[t] = weight.columns[order[t]];
    std::copy_n(weight.values.begin() + order[t] * weight.block, weight.block,
                by_tap.values.begin() + t * weight.block);
  }
  return by_tap;
}

}  // namespace

struct Layout {
  Layout(const Weight& weight, const SlrcWindow& window, const int64_t x_shape[4])
      : channels(x_shape[1]), rows(window, 0, x_shape[2]), columns(window, 1, x_shape[3]) {
    CheckInput(window, x_shape);
    per_group = channels / window.group;
    const int64_t taps = rows.kernel * columns.kernel;
    if (weight.largest_column >= per_group * taps)
      throw Error("column " + std::to_string(weight.largest_column) + " is out of range: the window has " +
                  std::to_string(per_group * taps) + " on an input of " + std::to_string(channels) + " channels");
    const int64_t pixels = rows.in * columns.in, most = kMostInput / MostPlaneFloats(window, x_shape);
    const int64_t sharing = std::min({kPanelChannels, kPanelFloats / pixels, most}) / std::max<int64_t>(1, per_group);
    const bool fill = weight.out_channels / weight.group % weight.block == 0;  // their block rows
    if (fill) panel_groups = std::clamp<int64_t>(sharing, 1, weight.group);
    panel_channels = panel_groups * per_group;
    if (MayBeMasked(weight, window) && per_group * pixels <= CacheFloats() / 2 && pixels >= Loops().lanes)
      by_tap = std::make_unique<const Weight>(SortedByTap(window, weight));
    if (const Axis alone(window, 1, x_shape[3], true); !by_tap && RepaysPlanes(weight, alone)) columns = alone;
    pitch = by_tap ? columns.in : columns.pitch;
    phases = PhasesRead(rows, columns);
    pointwise = taps == 1;
    for (const Axis* axis : {&rows, &columns})
      pointwise = pointwise && axis->stride == 1 && axis->pad == 0 && axis->out == axis->in;
    slices = OneSlice(weight);
    repeating = weight.block == 1 && !pointwise && !Seamless();
    if (repeating) pitch = CeilDiv(pitch, Loops().lanes) * Loops().lanes;
    tiled = !by_tap && !repeating && PlaceTiles(weight, taps);
    if (!tiled) PlacePlanes();
    SetOffsets(by_tap ? *by_tap : weight, window, taps);
    if (!tiled && !InPlace() && !repeating) Slice(weight, taps);
    if (rows.kernel == kWindow && rows.stride == 1 && rows.dilation == 1 && HoldsWindows(weight, taps)) parts = kWindow;
    CutRows(weight, tiled ? rows.out : band, &pieces);
    LeaveGaps(weight, &pieces);
    if (by_tap) Mask(*by_tap, window, taps);
    together = static_cast<int64_t>(pieces.size());
    if (tiled) {
      band = std::clamp<int64_t>(kTilesFloats / std::max<int64_t>(1, panel_channels * floats), 1, 8);
      bands = CeilDiv(static_cast<int64_t>(pieces.size()), band);
      together = kTogetherFloats / std::max<int64_t>(1, panel_channels * floats);
      for (int64_t b = 0; b < bands; ++b) AddTileRuns(b * band);
    } else if (!InPlace()) {
      CutRows(weight, rows.out - (bands - 1) * band, &last_pieces);
      LeaveGaps(weight, &last_pieces);
      for (int64_t b = 0; b < bands; ++b) AddPlaneRuns(b * band);
    }
    copies.push_back(runs.size());
  }

  // Surviving values that multiply an input channel.
  double ValuesPerChannel(const Weight& weight) const {
    return static_cast<double>(weight.values.size()) / static_cast<double>(weight.group * per_group);
  }
  // Whether a plane for each kernel column saves more than it costs, and there is room for all of them at once.
  bool RepaysPlanes(const Weight& weight, const Axis& alone) const {
    const double saved = ValuesPerChannel(weight) * static_cast<double>(columns.pitch - columns.out);
    const int64_t read = Product(PhasesRead(rows, alone).size(), (rows.out + rows.reach) * alone.pitch);
    return ReadsPlanes() && saved >= kRepaysPlane * static_cast<double>(columns.kernel * columns.out) &&
           Product(panel_channels, read) <= BandFloats();
  }
  bool InPlace() const { return by_tap || (pointwise && !tiled); }
  // Whether outputs that follow each other on the flat plane do so in y.
  bool Seamless() const { return pitch == columns.out; }

  // What a tile reads of each phase: its rows side by side, or all from the first to the last if that is less.
  bool PlaceTiles(const Weight& weight, int64_t taps) {
    widest = WidestPiece(weight.block, (rows.out - 1) * pitch + columns.out);
    floats = read = 0;
    for (Phase& phase : phases) {
      const int64_t row = CeilDiv(widest + phase.column_reach, Loops().lanes) * Loops().lanes;
      const int64_t all = std::max(row, widest + phase.column_reach + phase.row_reach * pitch);
      phase.apart = (phase.row_reach + 1) * row < all;
      phase.at = floats;
      phase.pitch = phase.apart ? row : pitch;
      floats += phase.apart ? (phase.row_reach + 1) * row : all;
      read += std::min((phase.row_reach + 1) * (row + 16), all + 16);
    }
    if (!pointwise) floats += Loops().lanes;  // for what a copy writes past its last run
    if (pointwise && rows.in * columns.in < Loops().lanes) return rows.in * columns.in > 2;
    if (ReadsPlanes() || per_group * read <= kSliceFloats) return false;
    const double values = ValuesPerChannel(weight);
    if (taps == 1) return values >= kRepaysCopy * static_cast<double>(floats);
    const double density = values / static_cast<double>(weight.rows_per_group * weight.block * taps);
    return density >= kLeastDensity && values >= kRepaysRows * static_cast<double>(floats);
  }

  void PlacePlanes() {
    if (by_tap) {
      band = rows.out;
      floats = rows.in * columns.in;
      return;
    }
    if (!pointwise) {
      const int64_t row_floats = Product(Product(panel_channels, phases.size()), pitch);
      const int64_t fitting = std::max<int64_t>(1, BandFloats() / std::max<int64_t>(1, row_floats) - rows.reach);
      band = CeilDiv(rows.out, CeilDiv(rows.out, fitting));
      bands = CeilDiv(rows.out, band);
    } else {
      band = rows.out;
    }
    const int64_t plane = Product(band + rows.reach, pitch), lanes = Loops().lanes;
    floats = 0;
    for (Phase& phase : phases) {
      const int64_t first = columns.First(phase.column);
      phase.pitch = pitch;
      phase.at = floats + Room(first) - first;
      floats += Room(first) + plane + (pointwise ? 0 : lanes);  // for what a copy writes past its last run
    }
  }

  // Across the seams, or, if that hardly leaves lanes idle, row by row: tiles are then stored where they belong.
  void CutRows(const Weight& weight, int64_t height, std::vector<Piece>* to) const {
    const int64_t lanes = Loops().lanes, idle = CeilDiv(columns.out, lanes) * lanes - pitch;
    std::vector<Piece> row;
    if (repeating) {
      Cut(weight.block, 0, columns.out, columns.out >= lanes, &row);
      for (Piece& piece : row) piece.repeats = height;
      to->insert(to->end(), row.begin(), row.end());
      return;
    }
    bool by_rows = !Seamless() && slices.count == 1 && columns.out >= 2 * lanes && idle <= pitch / 16;
    if (by_rows) {
      Cut(weight.block, 0, columns.out, true, &row);
      const int64_t sums = kTileRows[LoopsFor(weight.block)];  // for each vector
      for (const Piece& piece : row) by_rows = by_rows && sums * piece.vectors >= kBusySums;
    }
    if (!by_rows) return Cut(weight.block, 0, (height - 1) * pitch + columns.out, InPlace(), to);
    for (int64_t r = 0; r < height; ++r) Cut(weight.block, r * pitch, columns.out, true, to);
  }

  // Says of pieces that cross a seam which of their pixels are outputs, if tiles can leave the others out.
  void LeaveGaps(const Weight& weight, std::vector<Piece>* of) {
    const int64_t lanes = Loops().lanes;
    if (!Loops().masks || slices.count > 1 || !IsCheap(weight.activation) || Seamless() || repeating) return;
    for (Piece& piece : *of) {
      int64_t column = piece.start % pitch;
      if (column + piece.width <= columns.out || !piece.vectors) continue;
      Outputs found = {};
      int32_t kept = 0;
      for (int64_t p = 0; p < piece.width; ++p, column = (column + 1) % pitch) {
        if (p % lanes == 0) found.at[p / lanes] = kept;
        if (column >= columns.out || p >= piece.pixels) continue;
        found.kept[p / lanes] = static_cast<uint16_t>(found.kept[p / lanes] | 1u << p % lanes);
        ++kept;
      }
      outputs.push_back(found);
      piece.outputs = &outputs.back();
    }
  }

  // How far from an output's place in the input a tap reads, where both have one size.
  static int64_t Down(const SlrcWindow& window, int64_t kh) { return kh * window.dilations[0] - window.pads[0]; }
  static int64_t Right(const SlrcWindow& window, int64_t kw) { return kw * window.dilations[1] - window.pads[1]; }

  // Says of each piece which lanes each tap reads inside the input, taps that read alike together.
  void Mask(const Weight& weight, const SlrcWindow& window, int64_t taps) {
    const int64_t lanes = Loops().lanes, pixels = rows.in * columns.in;
    while (!pieces.back().vectors) pieces.pop_back();  // a single pixel has no lanes
    if (const Piece& last = pieces.back(); last.start + last.pixels < pixels)
      pieces.push_back({pixels - lanes, lanes, lanes, 1, kWhole});
    for (Piece& piece : pieces) {
      groups.emplace_back();
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t down = Down(window, t % rows.kernel), right = Right(window, t / rows.kernel);
        Taps one = {static_cast<int32_t>(t + 1), {}};
        for (int64_t p = 0; p < piece.width; ++p) {
          const int64_t row = (piece.start + p) / columns.in + down, column = (piece.start + p) % columns.in + right;
          const bool inside = row >= 0 && row < rows.in && column >= 0 && column < columns.in;
          one.read[p / lanes] = static_cast<uint16_t>(one.read[p / lanes] | (inside ? 1u << p % lanes : 0u));
        }
        std::vector<Taps>& found = groups.back();
        if (found.empty() || !std::equal(one.read, std::end(one.read), found.back().read)) found.push_back(one);
        found.back().last = one.last;
      }
      piece.groups = groups.back().data();
      piece.group_count = static_cast<int64_t>(groups.back().size());
    }
    for (size_t r = 0; r + 1 < weight.row_pointers.size(); ++r)
      for (int64_t t = 0, end = weight.row_pointers[r]; t < taps; ++t) {
        while (end < weight.row_pointers[r + 1] && TapOrder(window, weight.columns[end]) == t) ++end;
        tap_ends.push_back(static_cast<int32_t>(end));
      }
  }

  void Slice(const Weight& weight, int64_t taps) {
    const int64_t block_rows = static_cast<int64_t>(weight.row_pointers.size()) - 1;
    const int64_t wanted = CeilDiv(per_group * read, kSliceFloats);
    const int64_t most = static_cast<int64_t>(weight.columns.size()) / block_rows / kLeastBlocks;
    const int64_t count = std::min({wanted, most, per_group});
    if (ReadsPlanes() || count < 2 || !weight.sorted) return;
    const auto begin = weight.columns.begin();
    for (int64_t k = 0; k <= count; ++k) {
      const int64_t first_column = k * per_group / count * taps;
      for (int64_t r = 0; r < block_rows; ++r) {
        const auto end = begin + weight.row_pointers[r + 1];
        const auto start = std::lower_bound(begin + weight.row_pointers[r], end, first_column);
        starts.push_back(static_cast<int32_t>(start - begin));
      }
    }
    slices = {starts.data(), count, block_rows};
  }

  // Where a tile finds each column.
  void SetOffsets(const Weight& weight, const SlrcWindow& window, int64_t taps) {
    std::vector<int32_t> of_tap(taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t kh = tap / columns.kernel, kw = tap % columns.kernel;
      if (by_tap) {
        of_tap[tap] = static_cast<int32_t>(Down(window, kh) * pitch + Right(window, kw));
        continue;
      }
      const Phase* phase = phases.data();
      while (phase->row != rows.Phase(kh) || phase->column != columns.Phase(kw)) ++phase;
      of_tap[tap] = static_cast<int32_t>(phase->at + rows.Shift(kh) * phase->pitch + columns.Shift(kw));
    }
    for (size_t r = 0, t = 0; r + 1 < weight.row_pointers.size(); ++r) {
      const int64_t first_channel = r / weight.rows_per_group % panel_groups * per_group;
      for (; t < static_cast<size_t>(weight.row_pointers[r + 1]); ++t) {
        const int32_t column = weight.columns[t];
        offsets.push_back(static_cast<int32_t>((first_channel + column / taps) * floats) + of_tap[column % taps]);
      }
    }
  }

  // Whether each block row holds all taps of one channel and nothing else: then those of each kernel row are alike.
  static bool HoldsWindows(const Weight& weight, int64_t taps) {
    for (size_t r = 0; r + 1 < weight.row_pointers.size(); ++r) {
      const int32_t* const columns = weight.columns.data() + weight.row_pointers[r];
      if (weight.row_pointers[r + 1] - weight.row_pointers[r] != taps || columns[0] % taps) return false;
      for (int64_t tap = 1; tap < taps; ++tap)
        if (columns[tap] != columns[0] + tap) return false;
    }
    return true;
  }

  void AddTileRuns(int64_t first_piece) {
    copies.push_back(runs.size());
    const int64_t count = std::min(band, static_cast<int64_t>(pieces.size()) - first_piece);
    for (int64_t i = 0; i < count; ++i)
      for (const Phase& phase : phases) {
        const int64_t start = pieces[first_piece + i].start, to = i * panel_channels * floats + phase.at;
        const int64_t row = widest + phase.column_reach;
        if (phase.apart)
          for (int64_t r = 0; r <= phase.row_reach; ++r)
            AddRuns(phase, 0, start + r * pitch, row, to + r * phase.pitch);
        else
          AddRuns(phase, 0, start, row + phase.row_reach * pitch, to);
      }
    // First all zeros: written past a channel's end, they would be in the next one's way.
    std::stable_partition(runs.begin() + copies.back(), runs.end(), [](const Run& run) { return run.floats == 0; });
  }

  // By rows, each with its right padding, which is the next one's left padding, too.
  void AddPlaneRuns(int64_t first_row) {
    copies.push_back(runs.size());
    const int64_t height = band + rows.reach;
    for (const Phase& phase : phases) {
      const int64_t first = columns.First(phase.column), count = columns.End(phase.column) - first;
      const auto row_of = [&](int64_t r) { return (first_row + r) * rows.stride + phase.row - rows.pad; };
      int64_t top = 0, bottom = height;  // the rows that come from the input
      while (top < height && row_of(top) < 0) ++top;
      while (bottom > top && (!count || row_of(bottom - 1) >= rows.in)) --bottom;
      const int64_t begin = phase.at + first, from = row_of(top) * columns.in + first * columns.stride + phase.column;
      AddZeros(begin - Room(first), Room(first) + top * pitch);
      if (top < bottom) {
        AddRun(from - columns.pad, begin + top * pitch, count, pitch);
        runs.back().rows = static_cast<int32_t>(bottom - top);
        runs.back().from_step = static_cast<int32_t>(rows.stride * columns.in);
        runs.back().to_step = static_cast<int32_t>(pitch);
      }
      AddZeros(begin + bottom * pitch, (height - bottom) * pitch + Loops().lanes);
    }
  }
  // Of a plane, before what its first row takes from the input: if rows are to begin with a vector, whole ones.
  int64_t Room(int64_t first) const { return repeating ? CeilDiv(first, Loops().lanes) * Loops().lanes : first; }

  void AddRun(int64_t from, int64_t to, int64_t floats, int64_t written) {
    runs.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), static_cast<int32_t>(floats),
                    static_cast<int32_t>(written)});
  }
  void AddZeros(int64_t to, int64_t floats) {
    if (floats) AddRun(0, to, 0, floats);
  }

  // Copies the pixels from `flat` on of the plane that begins at output row `first_row`.
  void AddRuns(const Phase& phase, int64_t first_row, int64_t flat, int64_t count, int64_t to) {
    const int64_t begin = columns.First(phase.column), end = std::max(begin, columns.End(phase.column));
    while (count > 0) {
      const int64_t row = (first_row + flat / pitch) * rows.stride + phase.row - rows.pad, column = flat % pitch;
      const bool inside = row >= 0 && row < rows.in;
      int64_t from = -1, until = pitch;
      if (inside && column < begin) until = begin;
      if (inside && column >= begin && column < end) {
        from = row * columns.in + column * columns.stride + phase.column - columns.pad;
        until = end;
      }
      const int64_t some = std::min(until - column, count);
      Run* const run = runs.size() > copies.back() ? &runs.back() : nullptr;
      if (from < 0 && run && run->to + run->written == to)
        run->written += static_cast<int32_t>(some);
      else if (from < 0)
        AddZeros(to, some);
      else if (run && run->from + run->floats * columns.stride == from && run->to + run->floats == to &&
               run->written == run->floats)
        run->written = run->floats += static_cast<int32_t>(some);
      else
        AddRun(from, to, some, some);
      flat += some;
      to += some;
      count -= some;
    }
  }

  // Of planes, a tile may read up to a vector past the last pixel.
  int64_t Slack() const { return kMaxLanes + (tiled ? 0 : columns.lead + kMaxTilePixels); }

  // Copies some channels of one band: their tiles, or their planes.
  void Copy(const float* x, int64_t readable, int64_t which, int64_t count, float* to) const {
    const int64_t run_count = static_cast<int64_t>(copies[which + 1] - copies[which]);
    Loops().copy({runs.data() + copies[which], run_count, x, readable, columns.stride, rows.in * columns.in, floats, to,
                  count, tiled});
    if (!tiled) std::fill_n(to + count * floats, Slack(), 0.0f);
  }

  int64_t channels, per_group;
  int64_t panel_groups = 1;  // the last panel may hold fewer
  int64_t panel_channels;
  Axis rows, columns;
  int64_t pitch;   // of the plane's rows
  int64_t widest;  // of the pieces
  std::vector<Phase> phases;
  bool pointwise, tiled;
  int64_t floats;                  // of a channel, in a plane or a copied tile
  int64_t read;                    // of a plane's channel by a tile, with half a cache line on each side of a row
  int64_t band = 1, bands = 1;     // output rows, or pieces if tiled
  std::vector<Piece> pieces;       // of a band, or of all if tiled
  std::vector<Piece> last_pieces;  // of the last band, which may have fewer rows
  // The weight in the order of its taps, if tiles read the input where it is and leave out what is padding; else null.
  std::unique_ptr<const Weight> by_tap;
  std::deque<std::vector<Taps>> groups;  // of pieces, which point to them
  std::vector<int32_t> tap_ends;         // see Strip
  std::deque<Outputs> outputs;           // of pieces, which point to them
  int64_t together = 1;            // see Panel
  bool repeating;                  // whether pieces are those of one row, repeated on all of a band (blocks of one row)
  int64_t parts = 1;               // the window of Panel
  std::vector<int32_t> starts;
  Slices slices;
  std::vector<int32_t> offsets;
  std::vector<Run> runs;
  std::vector<size_t> copies;  // where those of a band begin; then the end
};

Conv::Conv(const SlrcBlocks& blocks, const SlrcWindow& window) : weight_(blocks, window.group), window_(window) {
  CheckWindow(window);
}

Conv::~Conv() = default;

void Conv::OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const {
  y_shape[0] = x_shape[0];
  y_shape[1] = weight_.out_channels;
  for (int axis = 0; axis < 2; ++axis) y_shape[2 + axis] = Axis(window_, axis, x_shape[2 + axis]).out;
}

std::shared_ptr<const Layout> Conv::FindLayout(const int64_t x_shape[4]) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& layout : layouts_)
    if (layout->channels == x_shape[1] && layout->rows.in == x_shape[2] && layout->columns.in == x_shape[3])
      return layout;
  auto layout = std::make_shared<const Layout>(weight_, window_, x_shape);
  if (layouts_.size() == kLayoutsKept) layouts_.erase(layouts_.begin());
  layouts_.push_back(layout);
  return layout;
}

void Conv::Run(const float* x, const int64_t x_shape[4], const float* residual, float* y,
               const Parallel& parallel) const {
  const std::shared_ptr<const Layout> layout = FindLayout(x_shape);
  const Layout& l = *layout;
  const Weight& weight = l.by_tap ? *l.by_tap : weight_;
  const int64_t group_panels = CeilDiv(weight.group, l.panel_groups);
  const int64_t in_plane = l.rows.in * l.columns.in, out_plane = l.rows.out * l.columns.out;
  const uint64_t owner = NewOwner();
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t band = index % l.bands, image = index / l.bands / group_panels;
    const int64_t group = index / l.bands % group_panels * l.panel_groups;
    const int64_t groups = std::min(l.panel_groups, weight.group - group);
    const int64_t begin = group * weight.rows_per_group + first;
    const int64_t end = std::min(group * weight.rows_per_group + last, (group + groups) * weight.rows_per_group);
    if (begin >= end) return;  // the last groups are fewer
    const float* from = x + (image * l.channels + group * l.per_group) * in_plane;
    int64_t offset = image * weight.out_channels * out_plane, rows = l.rows.out;
    Panel panel{from, l.offsets.data(), l.slices, l.pieces.data(), 0, 0, l.together, l.pitch, l.parts};
    panel.count = static_cast<int64_t>(l.pieces.size());
    if (l.by_tap) {
      panel.tap_ends = l.tap_ends.data();
      panel.taps = window_.kernel[0] * window_.kernel[1];
    }
    panel.far = l.InPlace() && ReadsPlanes() && l.per_group * in_plane > CacheFloats() / 2;
    if (l.tiled) {
      panel.pieces += band * l.band;
      panel.count = std::min(l.band, panel.count - band * l.band);
      panel.step = l.panel_channels * l.floats;
    } else if (!l.InPlace()) {
      offset += band * l.band * l.columns.out;
      rows = std::min(l.band, rows - band * l.band);
      if (band + 1 == l.bands) {
        panel.pieces = l.last_pieces.data();
        panel.count = static_cast<int64_t>(l.last_pieces.size());
      }
    }
    if (!l.InPlace()) {
      bool fresh;
      const int64_t copies = l.tiled ? panel.count : 1, floats = copies * l.panel_channels * l.floats + l.Slack();
      float* copied = Scratch::Inputs().Get(floats, owner, index, &fresh);
      const int64_t readable = x + x_shape[0] * l.channels * in_plane - from;
      if (fresh) l.Copy(from, readable, band, groups * l.per_group, copied);
      panel.x = copied;
    }
    // Without seams a task's pixels are one row: a tile that stands out past them is not written in place.
    const int64_t width = l.Seamless() ? rows * l.columns.out : l.columns.out;
    const int64_t pitch = l.Seamless() ? out_plane : l.pitch;
    const float* added = residual ? residual + offset : nullptr;
    SeamedOutput output{y + offset, added, out_plane, width, pitch};
    if (l.repeating && l.bands == 1 && IsCheap(weight.activation) && end - begin > 1) {
      output.may_stand_out = true;  // the last channel's may not: what follows is another task's
      RunPanel(weight, begin, end - 1, panel, output);
      output.may_stand_out = false;
      return RunPanel(weight, end - 1, end, panel, output);
    }
    RunPanel(weight, begin, end, panel, output);
  };
  const int64_t panels = x_shape[0] * group_panels * l.bands;
  const double work = static_cast<double>(weight.values.size()) * out_plane * x_shape[0];
  RunTasks(parallel, panels, l.panel_groups * weight.rows_per_group, 1, work, task);
}

}  // namespace slrc
