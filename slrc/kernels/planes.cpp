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

}  // namespace slrc
