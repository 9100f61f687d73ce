// What convolution and matrix multiplication share: block rows on a panel of pixels, scratch memory, tasks.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "block_sparse.h"

namespace slrc {

// Memory of a thread that grows and stays, so that nothing is allocated after the first call of a shape.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // Returns at least `count` floats, aligned to cache lines. `fresh` says whether they hold something other than what
  // the same owner left there under the same key.
  float* Get(int64_t count, uint64_t owner, int64_t key, bool* fresh) {
    *fresh = owner != owner_ || key != key_;
    if (count > size_) {
      free(data_);
      size_ = 0;
      owner_ = 0;
      data_ = static_cast<float*>(aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = count;
      *fresh = true;
    }
    owner_ = owner;
    key_ = key;
    return data_;
  }

  static Scratch& OfThisThread(int which = 0) {
    static thread_local Scratch scratch[2];
    return scratch[which];
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

// Rows are short: a call of memcpy for each would cost more than the copy. The last ones may be copied twice.
inline void CopyFloats(const float* from, int64_t count, float* to) {
  if (count >= 8) {
    for (int64_t i = 0; i + 8 < count; i += 8) memcpy(to + i, from + i, 8 * sizeof(float));
    memcpy(to + count - 8, from + count - 8, 8 * sizeof(float));
    return;
  }
  if (count < 4) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + 4 < count; i += 4) memcpy(to + i, from + i, 4 * sizeof(float));
  memcpy(to + count - 4, from + count - 4, 4 * sizeof(float));
}

// Splits `panels` x `units`, block rows of a group or pieces of a panel, into tasks, task(panel, first unit, end), panel by
// panel: a thread that goes on with a panel finds it in its scratch memory. `multiply_adds` is the work of all.
template <class Task>
void RunTasks(const Parallel& parallel, int64_t panels, int64_t units, double multiply_adds, const Task& task) {
  constexpr double kWorthATask = 5e5;  // some 20 us: far above the cost of handing a task to a thread
  constexpr int64_t kTasks = 64;
  const int64_t wanted = std::min<int64_t>(kTasks, static_cast<int64_t>(multiply_adds / kWorthATask) + 1);
  struct Shared {
    const Task& task;
    int64_t splits, units;
    std::atomic<bool> out_of_memory;
  } shared{task, std::min(units, (wanted + panels - 1) / panels), units, {false}};
  auto one = [](void* data, size_t i) {
    Shared& s = *static_cast<Shared*>(data);
    const int64_t panel = i / s.splits, part = i % s.splits;
    try {
      s.task(panel, part * s.units / s.splits, (part + 1) * s.units / s.splits);
    } catch (const std::bad_alloc&) {
      s.out_of_memory = true;  // an exception must not leave a thread that is not ours
    }
  };
  parallel.run(parallel.context, panels * shared.splits, one, &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

// A run of pixels that one tile computes: vectors, the last perhaps half as wide, or a single pixel (vectors == 0). A
// direct one stands in a row of y as it does in x; of another, the output says where its pixels belong.
struct Piece {
  int32_t x, y;
  int32_t pixels;
  int32_t first_run, runs;
  int8_t vectors;
  bool halved, direct;
};

// Pixels side by side in a tile and in y.
struct Run {
  int32_t y, tile, count;
};

// The pixels that a piece's loop reads.
inline int64_t Read(const Piece& piece, int64_t lanes) {
  return piece.vectors ? piece.vectors * lanes - (piece.halved ? lanes / 2 : 0) : 1;
}

// How a panel is cut into pieces.
struct Pieces {
  std::vector<Piece> list;
  std::vector<Run> runs;
  int64_t most;  // vectors in a piece
  bool may_halve;

  explicit Pieces(const Weight& weight) {
    const TileLoops& loops = Loops();
    const int wide = weight.block >= 8 && loops.max_vectors[1] ? 1 : 0;
    most = loops.max_vectors[wide];
    may_halve = loops.halved[wide][0] != nullptr;
  }

  // Adds the pieces of `length` pixels. Where nothing may be written past them (`direct`), the last piece begins early
  // enough to end with them, and some pixels are computed twice; so they must be at least the lanes, or at most 2.
  void Add(int64_t x, int64_t y, int64_t length, bool direct) {
    for (int64_t start = 0; start < length;) {
      const Cut cut = Next(start, length, direct);
      list.push_back({static_cast<int32_t>(x + cut.start), static_cast<int32_t>(y + cut.start),
                      static_cast<int32_t>(cut.pixels), 0, 0, static_cast<int8_t>(cut.vectors), cut.halved, direct});
      start = cut.start + cut.pixels;
    }
  }

  // Adds the pieces of a plane of outputs whose rows are `pitch` apart in x and `width` in y: row by row, or, if that
  // leaves many lanes idle, across the seams between rows, which are thrown away. `steps` are those of a tile's loop.
  void AddPlane(int64_t height, int64_t width, int64_t pitch, double steps) {
    constexpr double kScatterSteps = 20;  // what it costs to put the pixels of a tile in their places
    const int64_t lanes = Loops().lanes, vectors = (width + lanes - 1) / lanes;
    const double across = static_cast<double>(pitch) / lanes * (1 + kScatterSteps / std::max(1.0, steps));
    if (width >= 2 * lanes && static_cast<double>(vectors) <= across) {
      for (int64_t row = 0; row < height; ++row) Add(row * pitch, row * width, width, true);
      return;
    }
    const size_t first = list.size();
    Add(0, 0, (height - 1) * pitch + width, false);
    for (size_t i = first; i < list.size(); ++i) {
      Piece& piece = list[i];
      piece.first_run = static_cast<int32_t>(runs.size());
      int64_t row = piece.x / pitch, column = piece.x % pitch;
      for (int64_t p = 0; p < piece.pixels; p += pitch - column, column = 0, ++row)
        if (column < width)
          runs.push_back({static_cast<int32_t>(row * width + column), static_cast<int32_t>(p),
                          static_cast<int32_t>(std::min(width - column, piece.pixels - p))});
      piece.runs = static_cast<int32_t>(runs.size()) - piece.first_run;
    }
  }

 private:
  struct Cut {
    int64_t start, pixels;
    int vectors;
    bool halved;
  };

  Cut Next(int64_t start, int64_t end, bool exact) const {
    const int64_t lanes = Loops().lanes, left = end - start, whole = left / lanes, rest = left % lanes;
    int64_t vectors = rest <= 2 ? whole : whole + 1;  // a pixel or two are cheaper alone
    if (vectors == 0) return {start, 1, 0, false};
    // One vector alone would wait for its own sums: what is left over is shared out.
    if (vectors > most) vectors = vectors < 2 * most ? (vectors + 1) / 2 : most;
    if (vectors <= whole) return {start, vectors * lanes, static_cast<int>(vectors), false};

    const bool halved = may_halve && rest <= lanes / 2;
    const int64_t pixels = vectors * lanes - (halved ? lanes / 2 : 0);
    if (!exact) return {start, left, static_cast<int>(vectors), halved};
    if (pixels <= end) return {end - pixels, pixels, static_cast<int>(vectors), halved};
    if (whole) return {start, whole * lanes, static_cast<int>(whole), false};
    return {end - lanes, lanes, 1, false};
  }
};

// What one piece reads of all channels, copied side by side. Where it is, each row begins in a cache line of its own, and
// of many channels it does not stay in the first-level cache from one block row to the next.
struct Copies {
  Copies(int64_t channels_, int64_t apart_) : channels(channels_), apart(apart_) {}

  // Whether it is worth while, if so many steps of the innermost loop follow on a copy of so many vectors. Measured with
  // AVX2: a copied vector costs 3 cycles, a step gains 1 to 3 if there are many channels; of few columns most of a copy
  // would stay unread. Wider vectors fill their lines as it is.
  static bool Pays(int64_t channels, double density, double steps, double vectors) {
    return Loops().lanes <= 8 && channels >= 192 && density > 0.15 && steps > 2 * vectors;
  }

  void Add(int64_t from, int64_t to, int64_t more) { rows.push_back({from, to, more}); }

  void Copy(const float* x, int64_t pixels, float* to) const {
    for (int64_t c = 0; c < channels; ++c, x += apart, to += per_channel)
      for (const Row& row : rows) CopyFloats(x + row.from, pixels + row.more, to + row.to);
  }

  struct Row {
    int64_t from, to, more;  // more floats than the piece has pixels
  };
  int64_t channels, apart, per_channel = 0;
  std::vector<Row> rows;
};

struct Panel {
  const float* x;
  const int32_t* offsets;  // for each surviving block: where its column begins, from x, or from a copy for a piece
  const Pieces* pieces;
  const Copies* copies;  // null: x is read where it is
};

// Computes a group on a panel: block rows [first, last), or, if pieces are copied, pieces [first, last). Output says where channel c (of the group) stands; of pieces
// that are not direct it gathers and scatters tiles of pitch kMaxTilePixels.
template <class Output>
void RunPanel(const Weight& weight, int64_t group, int64_t first, int64_t last, const Panel& panel,
              const Output& output) {
  const TileLoops& loops = Loops();
  const int wide = weight.block >= 8 && loops.max_vectors[1] ? 1 : 0, rows = wide ? 8 : 4;
  const int64_t channels = weight.out_channels / weight.group;
  alignas(64) float sums[8 * kMaxTilePixels], residual[8 * kMaxTilePixels];
  const std::vector<Piece>& pieces = panel.pieces->list;
  Tile tile;
  tile.stride = weight.block;
  tile.activation = weight.activation;

  float* copy = nullptr;
  if (panel.copies) {
    bool fresh;
    copy = Scratch::OfThisThread(1).Get(panel.copies->channels * panel.copies->per_channel + kMaxLanes, 0, 0, &fresh);
  }
  // Without copies a block row's output is written in order; with them a piece is done with before the next is copied.
  const size_t chunk = copy ? 1 : pieces.size(), stop = copy ? last : pieces.size();
  const int64_t first_row = copy ? 0 : first, last_row = copy ? weight.rows_per_group : last;
  for (size_t begin = copy ? first : 0; begin < stop; begin += chunk) {
    const size_t end = std::min(begin + chunk, stop);
    if (copy) {
      const Piece& piece = pieces[begin];
      panel.copies->Copy(panel.x + piece.x, Read(piece, loops.lanes), copy);
    }
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t block_row = group * weight.rows_per_group + row, block = weight.row_pointers[block_row];
      tile.count = weight.row_pointers[block_row + 1] - block;
      tile.offsets = panel.offsets + block;
      for (int64_t inner = 0; inner < weight.block; inner += rows) {
        const int64_t channel = row * weight.block + inner;
        if (channel >= channels) break;
        tile.rows = static_cast<int>(std::min<int64_t>(rows, channels - channel));
        tile.values = weight.values.data() + block * weight.block + inner;
        tile.bias = weight.bias.data() + block_row * weight.block + inner;
        for (size_t p = begin; p < end; ++p) {
          const Piece& piece = pieces[p];
          const TileLoop* tiles = piece.halved ? loops.halved[wide] : loops.tile[wide];
          const TileLoop loop = piece.vectors ? tiles[piece.vectors - 1] : loops.pixel[wide];
          tile.x = copy ? copy : panel.x + piece.x;
          if (Output::kHasRows && piece.direct) {
            const int64_t at = channel * output.channel_stride() + piece.y;
            tile.y = output.y + at;
            tile.residual = output.residual ? output.residual + at : nullptr;
            tile.pitch = output.channel_stride();
            loop(tile);
            continue;
          }
          tile.y = sums;
          tile.residual = output.residual ? residual : nullptr;
          tile.pitch = kMaxTilePixels;
          if (output.residual) output.Gather(channel, tile.rows, piece, residual);
          loop(tile);
          output.Scatter(channel, tile.rows, piece, sums);
        }
      }
    }
  }
}

}  // namespace slrc
