// Max pooling of planes as the convolutions leave them, without a detour over another layout.
#include "pool.h"

namespace slrc {

void MaxPool2x2(const float* x, const int64_t shape[4], float* y, const Parallel& parallel) {
  const int64_t planes = shape[0] * shape[1], height = shape[2], width = shape[3];
  const int64_t in_plane = height * width, out_plane = height / 2 * (width / 2);
  if (planes == 0) return;
  auto task = [&](int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) Loops().max_pool_2x2(x + p * in_plane, height, width, y + p * out_plane);
  };
  RunTasks(parallel, 1, planes, 1, 4.0 * planes * in_plane, task);  // reading costs more than multiplying
}

}  // namespace slrc
