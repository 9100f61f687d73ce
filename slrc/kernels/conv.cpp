// Convolution: on a zero-padded plane every tap of the kernel is one constant offset, so there is no im2col.
//
// A stride of s splits the plane into phases: phase f holds the padded rows (columns) f, f + s, f + 2 s, ..., and tap k
// reads phase k d mod s at k d / s, one element for each output. Rows follow each other at a pitch that lets the right
// padding of one be the left padding of the next, and outputs are computed on the flat plane: the few at the seams
// are thrown away.
//
// An image is cut into bands of output rows whose input fits the second-level cache; the task that computes a band
// first copies its rows into the thread's scratch memory. What one tile reads of a band may still be more than the
// first-level cache holds, so the input channels are cut into slices, and all outputs go on from slice to slice.
//
// A 1x1 convolution of stride 1 needs no padded plane. If a tile reads more than that cache holds, often enough to
// repay a copy, its pixels are packed, channel after channel: they are then few whole cache lines. Otherwise it reads
// its input as it is.
#include <string.h>

#include <algorithm>
#include <limits>

#include "panel.h"

namespace slrc {
namespace {

constexpr int64_t kBandFloats = 96 * 1024;     // of input, in one band
constexpr int64_t kPackedFloats = 24 * 1024;   // the same, packed
constexpr int64_t kSliceFloats = 7 * 1024;     // of input that a tile reads in one slice; leaves room for the weights
constexpr int64_t kTogetherFloats = 6 * 1024;  // of packed pieces that a block row runs on before the next one
constexpr int64_t kLeastBlocks = 32;           // of a block row, in a slice: it also loads and stores the sums
constexpr int64_t kManyChannels = 192;         // so many are copied for a tile
constexpr int64_t kRepaysCopy = 8;             // surviving values for each float of a channel's copy
constexpr int64_t kRepaysPacking = 28;         // surviving values of an input channel, on average
constexpr size_t kLayoutsKept = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

int64_t Product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw Error("the shapes are too large");
  return product;
}

// Writes zeros; up to three more than asked for, which the caller overwrites.
inline void ClearFloats(int64_t count, float* to) {
  const float zeros[4] = {};
  for (int64_t i = 0; i < count; i += 4) memcpy(to + i, zeros, sizeof zeros);
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

// The outputs of a band on a plane with seams: flat pixel p is row p / pitch, column p % pitch.
struct SeamedOutput {
  float* y;  // the band's first row in the group's first channel
  const float* residual;
  int64_t channel_stride, width, pitch;

  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    const int64_t row = piece.start / pitch, column = piece.start % pitch;
    const int64_t at = channel * channel_stride + row * width + column;
    *place = {y + at, residual ? residual + at : nullptr, channel_stride};
    return column + piece.width <= width;
  }

  // Calls copy(where in y, where in the tile, how many) for each run of pixels that are outputs.
  template <class Copy>
  void ForRuns(const Piece& piece, const Copy& copy) const {
    int64_t row = piece.start / pitch, column = piece.start % pitch;
    for (int64_t p = 0; p < piece.pixels; p += pitch - column, column = 0, ++row)
      if (column < width) copy(row * width + column, p, std::min(width - column, piece.pixels - p));
  }

  void Gather(int64_t channel, int64_t channels, const Piece& piece, float* sums) const {
    ForRuns(piece, [&](int64_t at, int64_t p, int64_t count) {
      for (int64_t i = 0; i < channels; ++i)
        CopyFloats(residual + (channel + i) * channel_stride + at, count, sums + i * piece.width + p);
    });
  }

  void Scatter(int64_t channel, int64_t channels, const Piece& piece, const float* sums) const {
    ForRuns(piece, [&](int64_t at, int64_t p, int64_t count) {
      for (int64_t i = 0; i < channels; ++i)
        CopyFloats(sums + i * piece.width + p, count, y + (channel + i) * channel_stride + at);
    });
  }
};

}  // namespace

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
    const bool pointwise = taps == 1 && rows.out == rows.in && columns.out == columns.in && rows.pad + columns.pad == 0;
    const bool repaid = per_group * (WidestPiece(weight.block) + 16) > kSliceFloats &&
                        static_cast<int64_t>(weight.values.size()) / kRepaysPacking >= channels;
    packed = pointwise && pixels > 2 && (repaid || pixels < Loops().lanes);
    in_place = pointwise && !packed;
    if (in_place) {
      plane = pixels;
    } else if (packed) {
      plane = WidestPiece(weight.block);
    } else {
      pitch = columns.pitch;
      const int64_t row_floats = Product(Product(per_group, phases.size()), pitch);
      const int64_t fitting = std::max<int64_t>(1, kBandFloats / std::max<int64_t>(1, row_floats) - rows.reach);
      band = CeilDiv(rows.out, CeilDiv(rows.out, fitting));
      bands = CeilDiv(rows.out, band);
      plane = Product(band + rows.reach, pitch);
    }
    if (Product(Product(per_group, phases.size()), plane) > std::numeric_limits<int32_t>::max() / 2)
      throw Error("an input plane is too large");
    SetOffsets(weight, taps, static_cast<int64_t>(phases.size()) * plane, plane, pitch);

    slices = OneSlice(weight);
    if (in_place || packed) {
      Cut(weight.block, 0, pixels, in_place, &pieces);
      together = static_cast<int64_t>(pieces.size());
      if (packed) {
        const int64_t floats = std::max<int64_t>(1, per_group * plane);
        band = std::clamp<int64_t>(kPackedFloats / floats, 1, 8);
        bands = CeilDiv(static_cast<int64_t>(pieces.size()), band);
        together = kTogetherFloats / floats;
      }
    } else {
      if (!AddCopies(weight, taps)) Slice(weight, taps);
      CutRows(weight, band, &pieces);
      CutRows(weight, rows.out - (bands - 1) * band, &last_pieces);
      if (!copies.floats) together = static_cast<int64_t>(pieces.size());
    }
  }

  // Across the seams, or, if that hardly leaves lanes idle, row by row: tiles are then stored where they belong.
  void CutRows(const Weight& weight, int64_t height, std::vector<Piece>* to) const {
    const int64_t lanes = Loops().lanes, idle = CeilDiv(columns.out, lanes) * lanes - pitch;
    if (slices.count > 1 || columns.out < 2 * lanes || idle > pitch / 16)
      return Cut(weight.block, 0, (height - 1) * pitch + columns.out, false, to);
    for (int64_t row = 0; row < height; ++row) Cut(weight.block, row * pitch, columns.out, true, to);
  }

  // Of many channels a tile reads more than the first-level cache holds, each row from a line of its own. Copying it
  // side by side pays if enough block rows follow.
  bool AddCopies(const Weight& weight, int64_t taps) {
    const int64_t width = WidestPiece(weight.block), phase_count = static_cast<int64_t>(phases.size());
    const int64_t row = width + columns.reach, all = row + rows.reach * pitch;
    const bool apart = (rows.reach + 1) * row < all;
    const int64_t of_phase = apart ? (rows.reach + 1) * row : all;
    const double blocks = static_cast<double>(weight.columns.size()) / static_cast<double>(weight.group * per_group);
    const double density = blocks / static_cast<double>(weight.rows_per_group * taps);
    const double repaid = static_cast<double>(kRepaysCopy * phase_count * of_phase);
    // Of few columns most of a copy would stay unread; wider vectors fill their lines as it is.
    if (Loops().lanes > 8 || per_group < kManyChannels || density < 0.15 ||
        blocks * static_cast<double>(weight.block) < repaid)
      return false;
    for (int64_t phase = 0; phase < phase_count; ++phase)
      for (int64_t r = 0; r < (apart ? rows.reach + 1 : 1); ++r)
        copies.rows.push_back(
            {phase * plane + r * pitch, phase * of_phase + r * row, (apart ? row : of_phase) - width});
    copies.channels = per_group;
    copies.apart = phase_count * plane;
    copies.floats = phase_count * of_phase;
    SetOffsets(weight, taps, copies.floats, of_phase, apart ? row : pitch);
    return true;
  }

  void Slice(const Weight& weight, int64_t taps) {
    const int64_t block_rows = static_cast<int64_t>(weight.row_pointers.size()) - 1;
    // What a tile reads of a channel, and half a cache line on each side: rows, or all from the first to the last.
    const int64_t row = WidestPiece(weight.block) + columns.reach + 16;
    const int64_t read = std::min((rows.reach + 1) * row, rows.reach * pitch + row);
    const int64_t wanted = CeilDiv(per_group * static_cast<int64_t>(phases.size()) * read, kSliceFloats);
    const int64_t most = static_cast<int64_t>(weight.columns.size()) / block_rows / kLeastBlocks;
    const int64_t count = std::min({wanted, most, per_group});
    if (count < 2 || !weight.sorted) return;
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

  // Where a tile finds each column, with channels, phases and rows so far apart.
  void SetOffsets(const Weight& weight, int64_t taps, int64_t channel, int64_t phase_floats, int64_t row_floats) {
    std::vector<int32_t> of_tap(taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t kh = tap / columns.kernel, kw = tap % columns.kernel;
      int64_t phase = 0;
      while (phases[phase].row != rows.Phase(kh) || phases[phase].column != columns.Phase(kw)) ++phase;
      of_tap[tap] = static_cast<int32_t>(phase * phase_floats + rows.Shift(kh) * row_floats + columns.Shift(kw));
    }
    offsets.clear();
    for (int32_t column : weight.columns)
      offsets.push_back(static_cast<int32_t>(column / taps * channel) + of_tap[column % taps]);
  }

  int64_t Floats() const {  // a tile may read up to a vector past the last pixel
    return per_group * static_cast<int64_t>(phases.size()) * plane + columns.lead + kMaxTilePixels + kMaxLanes;
  }

  // Copies the input rows of a band, its group's channels, phase by phase.
  void Fill(const float* x, int64_t first_out, float* to) const {
    for (int64_t c = 0; c < per_group; ++c, x += rows.in * columns.in)
      for (const Phase& phase : phases) {
        const int64_t begin = columns.First(phase.column), end = std::max(begin, columns.End(phase.column));
        for (int64_t q = 0; q < band + rows.reach; ++q, to += pitch) {
          const int64_t row = (first_out + q) * rows.stride + phase.row - rows.pad;
          if (row < 0 || row >= rows.in) {
            ClearFloats(pitch, to);
            continue;
          }
          const float* from = x + row * columns.in + begin * columns.stride + phase.column - columns.pad;
          ClearFloats(begin, to);
          if (columns.stride == 1)
            CopyFloats(from, end - begin, to + begin);
          else
            for (int64_t i = begin; i < end; ++i, from += columns.stride) to[i] = *from;
          ClearFloats(pitch - end, to + end);
        }
      }
    std::fill_n(to, columns.lead + kMaxTilePixels + kMaxLanes, 0.0f);
  }

  // Copies the pixels of some pieces, its group's channels.
  void Pack(const float* x, const Piece* from, int64_t count, float* to) const {
    for (int64_t c = 0; c < per_group; ++c, x += rows.in * columns.in, to += plane)
      for (int64_t i = 0; i < count; ++i) {
        float* at = to + i * per_group * plane;
        CopyFloats(x + from[i].start, from[i].pixels, at);
        std::fill_n(at + from[i].pixels, from[i].width - from[i].pixels, 0.0f);
      }
  }

  int64_t channels, per_group;
  Axis rows, columns;
  std::vector<Phase> phases;
  bool in_place, packed;
  int64_t band = 1, bands = 1;     // output rows, or pieces if packed
  int64_t pitch = 1, plane;        // of rows; of a phase, or a channel of a piece if packed
  std::vector<Piece> pieces;       // of a band, or of all bands if packed
  std::vector<Piece> last_pieces;  // of the last band, which may have fewer rows
  int64_t together = 1;            // see Panel
  std::vector<int32_t> starts;
  Slices slices;
  Copies copies;
  std::vector<int32_t> offsets;
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
  // A task has some block rows, or, where each piece is copied first, some pieces.
  const int64_t splits = l.copies.floats ? static_cast<int64_t>(l.pieces.size()) : weight_.rows_per_group;
  auto task = [&](int64_t index, int64_t first, int64_t last) {
    const int64_t band = index % l.bands, image = index / l.bands, group = image % groups;
    const float* from = x + image * l.per_group * in_plane;
    const int64_t offset = image * channels * out_plane;
    const float* added = residual ? residual + offset : nullptr;
    Panel panel{from, l.offsets.data(), l.slices, l.pieces.data(), 0, 0, l.together, nullptr};
    panel.count = static_cast<int64_t>(l.pieces.size());
    if (l.copies.floats) panel.copies = &l.copies;
    bool fresh;
    if (l.in_place || l.packed) {
      if (l.packed) {
        panel.pieces += band * l.band;
        panel.count = std::min(l.band, panel.count - band * l.band);
        panel.step = l.per_group * l.plane;
        float* tiles = Scratch::Inputs().Get(l.band * panel.step + kMaxLanes, owner, index, &fresh);
        if (fresh) l.Pack(from, panel.pieces, panel.count, tiles);
        panel.x = tiles;
      }
      RunPanel(weight_, group, first, last, panel, SeamedOutput{y + offset, added, out_plane, out_plane, out_plane});
      return;
    }
    if (band + 1 == l.bands) {
      panel.pieces = l.last_pieces.data();
      panel.count = static_cast<int64_t>(l.last_pieces.size());
    }
    float* plane = Scratch::Inputs().Get(l.Floats(), owner, index, &fresh);
    if (fresh) l.Fill(from, band * l.band, plane);
    panel.x = plane;
    if (panel.copies) {
      panel.pieces += first * panel.count / splits;
      panel.count = last * panel.count / splits - first * panel.count / splits;
      first = 0;
      last = weight_.rows_per_group;
    }
    const int64_t at = band * l.band * l.columns.out;
    RunPanel(weight_, group, first, last, panel,
             SeamedOutput{y + offset + at, added ? added + at : nullptr, out_plane, l.columns.out, l.pitch});
  };
  const int64_t panels = x_shape[0] * groups * l.bands;
  const double work = static_cast<double>(weight_.values.size()) * out_plane * x_shape[0];
  RunTasks(parallel, panels, splits, work, task);
}

}  // namespace slrc
