// Convolution: on a zero-padded plane every tap of the kernel is one constant offset, so there is no im2col.
//
// A stride of s splits the plane into phases: phase f holds the padded rows (columns) f, f + s, f + 2 s, ..., and tap k
// reads phase k d mod s at k d / s, one element for each output. Rows follow each other at a pitch that lets the right
// padding of one be the left padding of the next, and outputs are computed on the flat plane: the few at the seams
// are thrown away.
//
// An image is cut into bands of output rows whose input fits the second-level cache; the task that computes a band
// first copies its rows into the thread's scratch memory. A 1x1 convolution of stride 1 reads its input as it is.
#include <algorithm>
#include <limits>

#include "panel.h"

namespace slrc {
namespace {

constexpr int64_t kBandFloats = 96 * 1024;  // of input, in one band
constexpr size_t kLayoutsKept = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

int64_t Product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw Error("the shapes are too large");
  return product;
}

// One dimension of the window.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
  int64_t reach;       // the last output of a phase reads this far past itself
  int64_t lead, tail;  // in every phase that is read, elements before `lead` and from `tail` on are zero
  int64_t pitch;       // least distance of rows that leaves what is read intact

  Axis(const SlrcWindow& window, int axis, int64_t size)
      : in(size),
        kernel(window.kernel[axis]),
        stride(window.strides[axis]),
        pad(window.pads[axis]),
        dilation(window.dilations[axis]) {
    const int64_t span = (kernel - 1) * dilation + 1, padded = pad + in + window.pads[axis + 2];
    if (in < 1 || padded < span) throw Error("the window is larger than the padded input");
    out = (padded - span) / stride + 1;
    reach = (kernel - 1) * dilation / stride;
    lead = std::numeric_limits<int64_t>::max();
    tail = 0;
    for (int64_t k = 0; k < kernel; ++k) {
      lead = std::min(lead, First(Phase(k)));
      tail = std::max(tail, End(Phase(k)));
    }
    pitch = std::max({tail, out + reach - lead, out});
  }

  int64_t Phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t Shift(int64_t tap) const { return tap * dilation / stride; }
  // A phase's elements that come from the input: [First, End); element q is input q * stride + phase - pad.
  int64_t First(int64_t phase) const { return std::clamp<int64_t>(CeilDiv(pad - phase, stride), 0, out + reach); }
  int64_t End(int64_t phase) const {
    return std::clamp<int64_t>(CeilDiv(pad + in - phase, stride), First(phase), out + reach);
  }
};

struct Phase {
  int64_t row, column;
};

std::vector<Phase> PhasesRead(const Axis& rows, const Axis& columns) {
  std::vector<Phase> phases;
  for (int64_t r = 0; r < rows.stride; ++r)
    for (int64_t c = 0; c < columns.stride; ++c) {
      bool row_read = false, column_read = false;
      for (int64_t k = 0; k < rows.kernel; ++k) row_read |= rows.Phase(k) == r;
      for (int64_t k = 0; k < columns.kernel; ++k) column_read |= columns.Phase(k) == c;
      if (row_read && column_read) phases.push_back({r, c});
    }
  return phases;
}

void CheckWindow(const SlrcWindow& window) {
  constexpr int64_t kMost = 1 << 15;  // keeps every sum and product of two of them far from overflow
  auto in_range = [](int64_t value, int64_t least) { return value >= least && value <= kMost; };
  bool good = window.group >= 1;
  for (int axis = 0; axis < 2; ++axis)
    good = good && in_range(window.kernel[axis], 1) && in_range(window.strides[axis], 1) &&
           in_range(window.dilations[axis], 1) && in_range(window.pads[axis], 0) && in_range(window.pads[axis + 2], 0);
  if (!good || window.strides[0] > 64 || window.strides[1] > 64)
    throw Error("kernel_shape, strides (up to 64), dilations and group must be positive, pads not negative, none huge");
}

// The channels of a group in y, from a band's first pixel on.
struct ConvOutput {
  static constexpr bool kHasRows = true;
  float* y;
  const float* residual;
  int64_t plane;
  const Run* runs;

  int64_t channel_stride() const { return plane; }

  void Gather(int64_t channel, int rows, const Piece& piece, float* tile) const {
    for (int r = 0; r < piece.runs; ++r) {
      const Run& run = runs[piece.first_run + r];
      for (int i = 0; i < rows; ++i)
        CopyFloats(residual + (channel + i) * plane + run.y, run.count, tile + i * kMaxTilePixels + run.tile);
    }
  }

  void Scatter(int64_t channel, int rows, const Piece& piece, const float* tile) const {
    for (int r = 0; r < piece.runs; ++r) {
      const Run& run = runs[piece.first_run + r];
      for (int i = 0; i < rows; ++i)
        CopyFloats(tile + i * kMaxTilePixels + run.tile, run.count, y + (channel + i) * plane + run.y);
    }
  }
};

}  // namespace

// How a group's input is laid out for the tiles.
struct Layout {
  Layout(const Weight& weight, const SlrcWindow& window, const int64_t x_shape[4])
      : channels(x_shape[1]), rows(window, 0, x_shape[2]), columns(window, 1, x_shape[3]) {
    if (channels != Product(channels / window.group, window.group))
      throw Error("group does not divide the input's " + std::to_string(channels) + " channels");
    per_group = channels / window.group;
    const int64_t taps = rows.kernel * columns.kernel;
    if (weight.largest_column >= Product(per_group, taps))
      throw Error("column " + std::to_string(weight.largest_column) + " is out of range: the window has " +
                  std::to_string(per_group * taps) + " on an input of " + std::to_string(channels) + " channels");
    phases = PhasesRead(rows, columns);
    const int64_t pixels = Product(rows.in, columns.in);
    in_place = taps == 1 && rows.out == rows.in && columns.out == columns.in && rows.pad + columns.pad == 0 &&
               (pixels >= Loops().lanes || pixels <= 2);
    if (in_place) {
      starts = {0, pixels};
      pitch = plane = pixels;
      cuts.emplace_back(pixels, Pieces(weight));
      cuts.back().second.Add(0, 0, pixels, true);
    } else {
      CutRows(weight);
    }
    if (Product(Product(per_group, phases.size()), plane) > std::numeric_limits<int32_t>::max() / 2)
      throw Error("an input plane is too large");
    const int64_t channel = static_cast<int64_t>(phases.size()) * plane;
    SetOffsets(weight, channel, plane, pitch);
    copies.reset(new Copies(per_group, channel));
    if (!AddCopies(weight)) copies.reset();
  }

  // Bands of output rows on a zero-padded plane.
  void CutRows(const Weight& weight) {
    pitch = columns.pitch;
    const int64_t row_floats = Product(Product(per_group, phases.size()), pitch);
    const int64_t fitting = std::max<int64_t>(1, kBandFloats / std::max<int64_t>(1, row_floats) - rows.reach);
    const int64_t band = CeilDiv(rows.out, CeilDiv(rows.out, fitting));
    plane = Product(band + rows.reach, pitch);
    for (int64_t start = 0; start < rows.out; start += band) starts.push_back(start);
    starts.push_back(rows.out);
    if (plane > std::numeric_limits<int32_t>::max() / 2) throw Error("an input plane is too large");
    for (int64_t k = 0; k < bands(); ++k)
      if (!Find(length(k))) {
        cuts.emplace_back(length(k), Pieces(weight));
        cuts.back().second.AddPlane(length(k), columns.out, pitch, weight.StepsPerRow());
      }
  }

  // Where a tile finds each column, with channels, phases and rows so far apart.
  void SetOffsets(const Weight& weight, int64_t channel, int64_t phase_floats, int64_t row_floats) {
    const int64_t taps = rows.kernel * columns.kernel;
    std::vector<int32_t> of_tap(taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t kh = tap / columns.kernel, kw = tap % columns.kernel;
      int64_t phase = 0;
      while (phases[phase].row != rows.Phase(kh) || phases[phase].column != columns.Phase(kw)) ++phase;
      of_tap[tap] = static_cast<int32_t>(phase * phase_floats + rows.Shift(kh) * row_floats + columns.Shift(kw));
    }
    offsets.clear();
    for (int32_t column : weight.columns)
      offsets.push_back(column / static_cast<int32_t>(taps) * static_cast<int32_t>(channel) + of_tap[column % taps]);
  }

  // Decides whether what a tile reads is copied side by side first; see Copies.
  bool AddCopies(const Weight& weight) {
    const int64_t tile = cuts[0].second.most * Loops().lanes, phase_count = static_cast<int64_t>(phases.size());
    // Rows of the kernel each for itself, or, where the plane's rows are short, all in one run.
    const int64_t row = CeilDiv(tile + columns.reach, 4) * 4, run = tile + rows.reach * pitch + columns.reach;
    const bool apart = (rows.reach + 1) * row < run;
    const int64_t of_phase = apart ? (rows.reach + 1) * row : CeilDiv(run, 4) * 4;
    const double vectors = static_cast<double>(phase_count * of_phase * per_group) / Loops().lanes;
    const double tile_rows = weight.block >= 8 && Loops().max_vectors[1] ? 8 : 4;
    const double steps = static_cast<double>(weight.columns.size()) / weight.group * (weight.block / tile_rows);
    const double density = weight.StepsPerRow() / static_cast<double>(per_group * rows.kernel * columns.kernel);
    if (!Copies::Pays(per_group, density, steps, vectors)) return false;
    for (int64_t phase = 0; phase < phase_count; ++phase)
      for (int64_t r = 0; r < (apart ? rows.reach + 1 : 1); ++r)
        copies->Add(phase * plane + r * pitch, phase * of_phase + r * row, (apart ? row : of_phase) - tile);
    copies->per_channel = phase_count * of_phase;
    SetOffsets(weight, copies->per_channel, of_phase, apart ? row : pitch);
    return true;
  }

  int64_t bands() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t length(int64_t band) const { return starts[band + 1] - starts[band]; }
  const Pieces* Find(int64_t length) const {
    for (const auto& cut : cuts)
      if (cut.first == length) return &cut.second;
    return nullptr;
  }

  int64_t MostPieces() const {
    size_t most = 0;
    for (const auto& cut : cuts) most = std::max(most, cut.second.list.size());
    return static_cast<int64_t>(most);
  }

  int64_t Floats() const {  // a tile, and a copy for one, may read past the last pixel
    return per_group * static_cast<int64_t>(phases.size()) * plane + columns.lead + kMaxTilePixels + kMaxLanes;
  }

  // Copies the input rows of a band, its group's channels, phase by phase.
  void Fill(const float* x, int64_t first_out, float* to) const {
    const int64_t height = plane / pitch;
    for (int64_t c = 0; c < per_group; ++c, x += rows.in * columns.in)
      for (const Phase& phase : phases) {
        const int64_t begin = columns.First(phase.column), end = std::max(begin, columns.End(phase.column));
        for (int64_t q = 0; q < height; ++q, to += pitch) {
          const int64_t row = (first_out + q) * rows.stride + phase.row - rows.pad;
          if (row < 0 || row >= rows.in) {
            std::fill_n(to, pitch, 0.0f);
            continue;
          }
          const float* from = x + row * columns.in + begin * columns.stride + phase.column - columns.pad;
          std::fill_n(to, begin, 0.0f);
          if (columns.stride == 1)
            CopyFloats(from, end - begin, to + begin);
          else
            for (int64_t i = begin; i < end; ++i, from += columns.stride) to[i] = *from;
          std::fill_n(to + end, pitch - end, 0.0f);
        }
      }
    std::fill_n(to, columns.lead + kMaxTilePixels + kMaxLanes, 0.0f);
  }

  int64_t channels, per_group;
  Axis rows, columns;
  std::vector<Phase> phases;
  bool in_place;
  std::vector<int64_t> starts;  // of the bands, and their end: output rows, or pixels if in place
  int64_t pitch, plane;         // how far rows and phases are apart
  std::vector<int32_t> offsets;
  std::vector<std::pair<int64_t, Pieces>> cuts;  // by the length of a band
  std::unique_ptr<Copies> copies;                // null if tiles read their input where it is
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
  const int64_t groups = weight_.group, channels = weight_.out_channels / groups;
  const int64_t in_plane = l.rows.in * l.columns.in, out_plane = l.rows.out * l.columns.out;
  const uint64_t owner = NewOwner();
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t band = index % l.bands(), image = index / l.bands(), group = image % groups;
    const float* from = x + image * l.per_group * in_plane;
    const int64_t at = image * channels * out_plane + l.starts[band] * (l.in_place ? 1 : l.columns.out);
    if (!l.in_place) {
      bool fresh;
      float* plane = Scratch::OfThisThread().Get(l.Floats(), owner, index, &fresh);
      if (fresh) l.Fill(from, l.starts[band], plane);
      from = plane;
    }
    const Pieces* pieces = l.Find(l.length(band));
    if (l.copies) {  // a shorter band has fewer
      first = std::min<int64_t>(first, pieces->list.size());
      last = std::min<int64_t>(last, pieces->list.size());
    }
    const ConvOutput output{y + at, residual ? residual + at : nullptr, out_plane, pieces->runs.data()};
    RunPanel(weight_, group, first, last, Panel{from, l.offsets.data(), pieces, l.copies.get()}, output);
  };
  const int64_t panels = x_shape[0] * groups * l.bands();
  const int64_t units = l.copies ? l.MostPieces() : weight_.rows_per_group;
  const double work = static_cast<double>(weight_.values.size()) * out_plane * x_shape[0];
  RunTasks(parallel, panels, units, work, task);
}

}  // namespace slrc
