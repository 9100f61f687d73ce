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

  static Scratch& OfThisThread() {
    static thread_local Scratch scratch;
    return scratch;
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

// Splits `panels` x the block rows of a group into tasks, task(panel, first block row, end), panel by panel: a thread
// that goes on with a panel finds it in its scratch memory. `multiply_adds` is the work of all.
template <class Task>
void RunTasks(const Parallel& parallel, int64_t panels, int64_t block_rows, double multiply_adds, const Task& task) {
  constexpr double kWorthATask = 5e5;  // some 20 us: far above the cost of handing a task to a thread
  constexpr int64_t kTasks = 64;
  const int64_t wanted = std::min<int64_t>(kTasks, static_cast<int64_t>(multiply_adds / kWorthATask) + 1);
  struct Shared {
    const Task& task;
    int64_t splits, block_rows;
    std::atomic<bool> out_of_memory;
  } shared{task, std::min(block_rows, (wanted + panels - 1) / panels), block_rows, {false}};
  auto one = [](void* data, size_t i) {
    Shared& s = *static_cast<Shared*>(data);
    const int64_t panel = i / s.splits, part = i % s.splits;
    try {
      s.task(panel, part * s.block_rows / s.splits, (part + 1) * s.block_rows / s.splits);
    } catch (const std::bad_alloc&) {
      s.out_of_memory = true;  // an exception must not leave a thread that is not ours
    }
  };
  parallel.run(parallel.context, panels * shared.splits, one, &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

// A run of pixels that one tile computes: vectors, the last perhaps half as wide, or a single pixel (vectors == 0).
struct Piece {
  int64_t start, pixels;
  int vectors;
  bool halved;
};

// Returns the piece that begins at `start`. Where nothing may be written past `end` (`exact`), the last piece begins
// early enough to end there, and some pixels are computed twice; so end must be at least the lanes, or at most 2.
inline Piece NextPiece(int64_t start, int64_t end, int64_t lanes, int64_t most, bool may_halve, bool exact) {
  const int64_t left = end - start, whole = left / lanes, rest = left % lanes;
  int64_t vectors = rest <= 2 ? whole : whole + 1;  // a pixel or two are cheaper alone
  if (vectors == 0) return {start, 1, 0, false};
  if (vectors > most) vectors = vectors < 2 * most ? (vectors + 1) / 2 : most;
  if (vectors <= whole) return {start, vectors * lanes, static_cast<int>(vectors), false};

  const bool halved = may_halve && rest <= lanes / 2;
  const int64_t pixels = vectors * lanes - (halved ? lanes / 2 : 0);
  if (!exact) return {start, left, static_cast<int>(vectors), halved};
  if (pixels <= end) return {end - pixels, pixels, static_cast<int>(vectors), halved};
  if (whole) return {start, whole * lanes, static_cast<int>(whole), false};
  return {end - lanes, lanes, 1, false};
}

struct Panel {
  const float* x;
  const int32_t* offsets;  // for each surviving block: where its column begins, from x
  int64_t length;          // pixels, side by side in x
  int64_t chunk;           // pixels that all block rows are computed on before the next ones: their input stays cached
};

// y is laid out as the panel: rows `pitch` apart.
struct PlainOutput {
  static constexpr bool kPlain = true;
  float* y;
  const float* residual;
  int64_t pitch;

  void Gather(int64_t, int, const Piece&, float*) const {}
  void Scatter(int64_t, int, const Piece&, const float*) const {}
};

// Computes block rows [first, end) of a group on a panel. Output says where channel c (of the group) and pixel p stand;
// if that is not plain rows, it gathers and scatters tiles of pitch kMaxTilePixels.
template <class Output>
void RunPanel(const Weight& weight, int64_t group, int64_t first, int64_t last, const Panel& panel,
              const Output& output) {
  const TileLoops& loops = Loops();
  const int wide = weight.block >= 8 && loops.max_vectors[1] ? 1 : 0, rows = wide ? 8 : 4;
  const int64_t channels = weight.out_channels / weight.group;
  alignas(64) float sums[8 * kMaxTilePixels], residual[8 * kMaxTilePixels];
  Tile tile;
  tile.stride = weight.block;
  tile.activation = weight.activation;

  for (int64_t begin = 0; begin < panel.length; begin += panel.chunk) {
    const int64_t end = std::min(begin + panel.chunk, panel.length);
    for (int64_t row = first; row < last; ++row) {
      const int64_t block_row = group * weight.rows_per_group + row, block = weight.row_pointers[block_row];
      tile.count = weight.row_pointers[block_row + 1] - block;
      tile.offsets = panel.offsets + block;
      for (int64_t inner = 0; inner < weight.block; inner += rows) {
        const int64_t channel = row * weight.block + inner;
        if (channel >= channels) break;
        tile.rows = static_cast<int>(std::min<int64_t>(rows, channels - channel));
        tile.values = weight.values.data() + block * weight.block + inner;
        tile.bias = weight.bias.data() + block_row * weight.block + inner;
        Piece piece;
        for (int64_t start = begin; start < end; start = piece.start + piece.pixels) {
          piece = NextPiece(start, end, loops.lanes, loops.max_vectors[wide], loops.halved[wide][0], Output::kPlain);
          tile.x = panel.x + piece.start;
          if constexpr (Output::kPlain) {
            tile.y = output.y + channel * output.pitch + piece.start;
            tile.residual = output.residual ? output.residual + channel * output.pitch + piece.start : nullptr;
            tile.pitch = output.pitch;
          } else {
            tile.y = sums;
            tile.residual = output.residual ? residual : nullptr;
            tile.pitch = kMaxTilePixels;
            if (output.residual) output.Gather(channel, tile.rows, piece, residual);
          }
          const TileLoop* tiles = piece.halved ? loops.halved[wide] : loops.tile[wide];
          (piece.vectors ? tiles[piece.vectors - 1] : loops.pixel[wide])(tile);
          if constexpr (!Output::kPlain) output.Scatter(channel, tile.rows, piece, sums);
        }
      }
    }
  }
}

}  // namespace slrc
