// What convolution and matrix multiplication share: block rows on a panel of pixels, scratch memory, tasks.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "block_sparse.h"

namespace slrc {

// Memory of a thread that grows and stays, so that nothing is allocated after the first call of a shape.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // Returns at least `count` floats, aligned to cache lines.
  float* Get(int64_t count) {
    if (count > size_) {
      free(data_);
      size_ = 0;
      data_ = static_cast<float*>(aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

  // The same; `fresh` says whether they hold something other than what the same owner left there under the same key.
  float* Get(int64_t count, uint64_t owner, int64_t key, bool* fresh) {
    *fresh = owner != owner_ || key != key_ || count > size_;
    owner_ = 0;
    Get(count);
    owner_ = owner;
    key_ = key;
    return data_;
  }

  static Scratch& Inputs() {
    static thread_local Scratch inputs;
    return inputs;
  }
  static Scratch& Sums() {
    static thread_local Scratch sums;
    return sums;
  }
  static Scratch& Hidden() {
    static thread_local Scratch hidden;
    return hidden;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
  uint64_t owner_ = 0;
  int64_t key_ = 0;
};

// Returns a number that no other call gets.
inline uint64_t NewOwner() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// Splits `panels` x `units`, parts of a panel, into tasks, task(panel, first unit, end), panel by panel: a thread that
// goes on with a panel finds it in its scratch memory. `multiply_adds` is the work of all; `together` units stay so.
template <class Task>
void RunTasks(const Parallel& parallel, int64_t panels, int64_t units, int64_t together, double multiply_adds,
              const Task& task) {
  constexpr double kWorthATask = 5e5;  // some 20 us: far above the cost of handing a task to a thread
  constexpr int64_t kTasks = 64;
  const int64_t wanted = std::min<int64_t>(kTasks, static_cast<int64_t>(multiply_adds / kWorthATask) + 1);
  struct Shared {
    const Task& task;
    int64_t splits, units, together;
    std::atomic<bool> out_of_memory;
  } shared{task, std::min(CeilDiv(units, together), CeilDiv(wanted, panels)), units, together, {false}};
  auto one = [](void* data, size_t i) {
    Shared& s = *static_cast<Shared*>(data);
    const int64_t panel = i / s.splits, part = i % s.splits;
    auto begin = [&s](int64_t k) {
      return std::min(s.units, k * CeilDiv(s.units, s.together) / s.splits * s.together);
    };
    try {
      s.task(panel, begin(part), begin(part + 1));
    } catch (const std::bad_alloc&) {
      s.out_of_memory = true;  // an exception must not leave a thread that is not ours
    }
  };
  parallel.run(parallel.context, panels * shared.splits, one, &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

constexpr int64_t kBusySums = 12;  // of a tile, in registers; with fewer, multiply-adds wait for each other

// A run of pixels that one tile computes: vectors and how they end, or a single pixel (vectors == 0).
struct Piece {
  int64_t start, pixels;
  int64_t width;  // pixels read and written: some may stand out past the end
  int vectors;
  Ending ending;
  int64_t repeats = 1;  // on so many rows of a plane, each in the same place
  const Taps* groups = nullptr;      // as in Strip, `group_count` of them
  int64_t group_count = 0;
  const Outputs* outputs = nullptr;  // which of its pixels are; null: all, or a tile cannot leave the others out
};

// Returns the piece that begins at `start`, for tiles of `rows` rows. Where nothing may be written past `end` (`exact`),
// the last piece begins early enough to end there, and some pixels are computed twice; so end must be at least the
// lanes, or at most 2.
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
inline int LoopsFor(int64_t block) { return block == 1 ? 0 : block >= 8 && Loops().max_vectors[2] ? 2 : 1; }

// Cuts `length` pixels from `origin` on into pieces.
template <class Pieces>
void Cut(int64_t block, int64_t origin, int64_t length, bool exact, Pieces* pieces) {
  const TileLoops& loops = Loops();
  const int wide = LoopsFor(block);
  for (int64_t start = 0; start < length;) {
    Piece piece = NextPiece(start, length, kTileRows[wide], loops.lanes, loops.max_vectors[wide],
                            loops.strip[kHalf][wide][0], loops.strip[kPixelMore][wide][0], exact);
    start = piece.start + piece.pixels;
    piece.start += origin;
    pieces->push_back(piece);
  }
}

// Returns the pixels of the widest of those pieces.
inline int64_t WidestPiece(int64_t block, int64_t length) {
  struct Widest {
    void push_back(const Piece& piece) { width = std::max(width, piece.width); }
    int64_t width = 0;
  } widest;
  Cut(block, 0, length, false, &widest);
  return widest.width;
}

// The surviving blocks of every block row, cut into `count` slices of neighbouring columns: slice k of block row r is
// starts[k * pitch + r] ... starts[(k + 1) * pitch + r] - 1.
struct Slices {
  const int32_t* starts;
  int64_t count, pitch;
};

inline Slices OneSlice(const Weight& weight) { return {weight.row_pointers.data(), 1, 1}; }

struct Panel {
  const float* x;
  const int32_t* offsets;  // for each surviving block: where its column begins, from x
  Slices slices;           // one after the other, on all pieces: what a slice reads of x stays cached
  const Piece* pieces;
  int64_t count;     // of pieces
  int64_t step;      // from one piece to the next in x; 0: a piece stands in x where it does in the panel
  int64_t together;  // how many pieces one block row may run on before the next one does
  int64_t pitch;     // from one row to the next, of pieces that are repeated
  int64_t window;    // see Strip, for pieces that are repeated
  // Where x has a pixel more apart from the vectors before it (null: beside them): the panel's pixels, `more_step` apart.
  const float* more_x = nullptr;
  const int32_t* more_offsets = nullptr;
  int64_t more_step = 0;
  const int32_t* tap_ends = nullptr;  // as in Strip, of all block rows, for pieces that have groups
  int64_t taps = 0;
  bool far = false;  // whether most of x is outside the second-level cache: the next piece's is then prefetched
};

// Where a piece stands in y and the residual (null if there is none): channels `pitch` apart, its repeats `row`, its
// pixels `pixel`.
struct Place {
  float* y;
  const float* residual;
  int64_t pitch, row, pixel;
  const Outputs* outputs;  // as in Strip
};

// Computes block rows [first, last), of one group or of groups that they fill, on a panel. Output finds the place of a
// piece, and says whether a tile may be written there; if not, it gathers the residual and scatters sums that are
// (channels, repeats, piece.width). If `Output::kMoreApart`, a pixel more is written to its place in any case, and no
// sums have it.
template <class Output>
void RunPanel(const Weight& weight, int64_t first, int64_t last, const Panel& panel, const Output& output) {
  const TileLoops& loops = Loops();
  const int wide = LoopsFor(weight.block);
  const int64_t channel = weight.FirstChannel(first);
  Strip strip = {};
  strip.values = weight.values.data();
  strip.offsets = panel.offsets;
  strip.block = weight.block;
  strip.channels = weight.FirstChannel(last) - channel;
  const bool sliced = panel.slices.count > 1;  // the sums of all pieces wait for the next slice
  strip.taps = panel.taps;
  strip.tap_ends = panel.tap_ends ? panel.tap_ends + first * panel.taps : nullptr;
  strip.more.offsets = panel.more_x ? panel.more_offsets : panel.offsets;
  float* all_sums = nullptr;
  if (sliced) {
    int64_t width = 0;
    for (int64_t i = 0; i < panel.count; ++i) width += panel.pieces[i].repeats * panel.pieces[i].width;
    all_sums = Scratch::Sums().Get(strip.channels * width);
  }

  for (int64_t slice = 0; slice < panel.slices.count; ++slice) {
    const bool is_last = slice + 1 == panel.slices.count;
    strip.begins = panel.slices.starts + slice * panel.slices.pitch + first;
    strip.ends = strip.begins + panel.slices.pitch;
    strip.bias = slice ? nullptr : weight.bias.data() + first * weight.block;
    strip.activation = is_last ? weight.activation : kNone;
    strip.slope = weight.slope;
    float* sums = all_sums;
    for (int64_t i = 0, pieces = 1; i < panel.count; i += pieces, pieces = 1) {
      const Piece& piece = panel.pieces[i];
      const int64_t vectors = piece.width - (piece.ending == kPixelMore);
      const int64_t width = piece.repeats * (Output::kMoreApart ? vectors : piece.width);
      Place place, next;
      const bool direct = output.Find(channel, piece, &place);
      if (!sliced && !direct) sums = Scratch::Sums().Get(strip.channels * width);
      strip.x = panel.x + (panel.step ? i * panel.step : piece.start);
      strip.x_step = panel.step ? panel.step : piece.width;
      strip.y_step = piece.width;
      strip.runs = piece.repeats;
      strip.ahead = panel.far ? piece.width : 0;
      strip.window = 1;
      strip.outputs = direct ? place.outputs : nullptr;
      strip.groups = piece.groups;
      strip.group_count = piece.group_count;
      if (piece.repeats > 1) {
        strip.x_step = panel.pitch;
        if (direct) strip.y_step = place.row;
        strip.window = panel.window;
      } else if (direct && !sliced && !place.outputs && !piece.groups) {
        for (const Piece* p = &piece + 1; pieces < panel.together && p < panel.pieces + panel.count; ++p, ++pieces) {
          const bool follows = p->start == p[-1].start + piece.width && p->vectors == piece.vectors &&
                               p->ending == piece.ending && output.Find(channel, *p, &next) && !next.outputs && !p->groups;
          if (!follows) break;
        }
        strip.runs = pieces;
      }
      strip.start = place.residual;
      strip.start_pitch = place.pitch;
      if (slice || (place.residual && !direct)) {
        if (!slice) output.Gather(channel, strip.channels, piece, sums);
        strip.start = sums;
        strip.start_pitch = width;
      }
      const bool done = is_last && direct;
      strip.y = done ? place.y : sums;
      strip.pitch = done ? place.pitch : width;
      strip.more.x = panel.more_x ? panel.more_x + (piece.start + vectors) * panel.more_step : strip.x + vectors;
      if (Output::kMoreApart) {
        strip.more.y = place.y + vectors * place.pixel;
        strip.more.start = place.residual ? place.residual + vectors * place.pixel : nullptr;
        strip.more.start_pitch = strip.more.pitch = place.pitch;
      } else {
        strip.more.y = strip.y + vectors;
        strip.more.start = strip.start ? strip.start + vectors : nullptr;
        strip.more.start_pitch = strip.start_pitch;
        strip.more.pitch = strip.pitch;
        if (strip.outputs && piece.ending == kPixelMore) {
          const int64_t at = place.outputs->at[piece.vectors];
          strip.more.y = strip.y + at;
          strip.more.start = strip.start && place.outputs->kept[piece.vectors] ? strip.start + at : nullptr;
        }
      }
      (piece.vectors ? loops.strip[piece.ending][wide][piece.vectors - 1] : loops.pixel[wide])(strip);
      if (is_last && !direct) output.Scatter(channel, strip.channels, piece, sums);
      if (sliced) sums += strip.channels * width;
    }
  }
}

}  // namespace slrc
