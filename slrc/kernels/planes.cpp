// Pooling and upsampling of planes as the convolutions leave them, without a detour over another layout; and the way
// from and to that of others.
#include "planes.h"

namespace slrc {
namespace {

// Runs a loop on each plane; `most` is the size of the larger of its input and output.
void RunPlanes(PlaneLoop loop, const float* x, const int64_t shape[4], float* y, int64_t y_plane, int64_t most,
               const Parallel& parallel) {
  const int64_t planes = shape[0] * shape[1], x_plane = shape[2] * shape[3];
  if (planes == 0) return;
  auto task = [&](int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) loop(x + p * x_plane, shape[2], shape[3], y + p * y_plane);
  };
  RunTasks(parallel, 1, planes, 1, 4.0 * planes * most, task);  // reading costs more than multiplying
}

// y (n, columns, rows) = x (n, rows, columns), a square after the other, which the first-level cache holds.
void TransposeEach(const float* x, int64_t n, int64_t rows, int64_t columns, float* y, const Parallel& parallel) {
  constexpr int64_t kSide = 64;
  if (n * rows * columns == 0) return;
  const int64_t strips = CeilDiv(rows, kSide);
  auto task = [&](int64_t, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t at = s / strips * rows * columns, row = s % strips * kSide;
      for (int64_t column = 0; column < columns; column += kSide)
        Loops().transpose(x + at + row * columns + column, columns, std::min(kSide, rows - row),
                          std::min(kSide, columns - column), y + at + column * rows + row, rows);
    }
  };
  RunTasks(parallel, 1, n * strips, 1, 4.0 * n * rows * columns, task);
}

// One row of each phase, `apart` from the one before, pixel by pixel; `Block` is 0 where the compiler does not know it.
template <int Block>
void Interleave(const float* __restrict x, int64_t apart, int64_t block, int64_t width, float* __restrict y) {
  if (Block) block = Block;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t k = 0; k < block; ++k) y[j * block + k] = x[k * apart + j];
}

}  // namespace

void MaxPool2x2(const float* x, const int64_t shape[4], float* y, const Parallel& parallel) {
  const int64_t y_plane = shape[2] / 2 * (shape[3] / 2);
  RunPlanes(Loops().max_pool_2x2, x, shape, y, y_plane, shape[2] * shape[3], parallel);
}

void UpsampleBilinear2x(const float* x, const int64_t shape[4], float* y, const Parallel& parallel) {
  const int64_t y_plane = 4 * shape[2] * shape[3];
  RunPlanes(Loops().upsample_bilinear_2x, x, shape, y, y_plane, y_plane, parallel);
}

void ChannelsFirst(const float* x, const int64_t shape[4], float* y, const Parallel& parallel) {
  TransposeEach(x, shape[0], shape[1] * shape[2], shape[3], y, parallel);
}

void ChannelsLast(const float* x, const int64_t shape[4], float* y, const Parallel& parallel) {
  TransposeEach(x, shape[0], shape[1], shape[2] * shape[3], y, parallel);
}

void DepthToSpace(const float* x, const int64_t shape[4], int64_t block, float* y, const Parallel& parallel) {
  const int64_t channels = shape[1] / (block * block), rows = shape[2], width = shape[3];
  const int64_t apart = channels * rows * width, planes = shape[0] * channels;
  if (planes * rows * width == 0) return;
  const auto interleave = block == 2 ? Interleave<2> : block == 4 ? Interleave<4> : Interleave<0>;
  auto task = [&](int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t phase = 0; phase < block; ++phase) {
          const int64_t image = p / channels, place = p % channels * rows + row, to = (p * rows + row) * block + phase;
          interleave(x + (image * block + phase) * block * apart + place * width, apart, block, width,
                     y + to * width * block);
        }
  };
  RunTasks(parallel, 1, planes, 1, 4.0 * planes * rows * width * block * block, task);
}

}  // namespace slrc
