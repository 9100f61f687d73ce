#include "byte_pool.h"

#include <string.h>

#include "window.h"

namespace slrc {
namespace {

constexpr int64_t kAtOnce = 8 * 1024;  // bytes of planes whose maxima are taken together
constexpr int64_t kPast = 64;          // that loops may read past the last window

}  // namespace

void CheckPool(const SlrcWindow& window) {
  CheckWindow(window);
  Int8Loops();  // a library without them says so now
  for (int axis = 0; axis < 4; ++axis)
    if (window.pads[axis] >= window.kernel[axis % 2]) throw Error("pads of a pool must be less than its kernel's size");
}

// Some small planes at once, or some rows of a large one: where they are, or, with padding, copied between zeros, the
// least byte.
void MaxPoolBytes(const uint8_t* x, const int64_t x_shape[4], const SlrcWindow& window, uint8_t* y,
                  const Parallel& parallel) {
  const int64_t plane_shape[4] = {1, 1, x_shape[2], x_shape[3]};
  CheckInput(window, plane_shape);
  const int64_t planes = x_shape[0] * x_shape[1], height = x_shape[2], width = x_shape[3];
  const int64_t out_height = OutputSize(window, 0, height), out_width = OutputSize(window, 1, width);
  const int64_t stride = window.strides[0], kernel = window.kernel[0];
  const int64_t read = (out_width - 1) * window.strides[1] + window.kernel[1];
  const bool pads = window.pads[0] || window.pads[1] || read > width || (out_height - 1) * stride + kernel > height;
  const int64_t pitch = pads ? std::max(read, window.pads[1] + width) : width;
  const int64_t band = std::clamp<int64_t>((kAtOnce / pitch - kernel) / stride + 1, 1, out_height);
  const int64_t rows = (band - 1) * stride + kernel;  // that a band reads
  const int64_t plane = pads ? rows * pitch : height * width;
  const int64_t together = band == out_height ? std::clamp<int64_t>(kAtOnce / plane, 1, std::max<int64_t>(planes, 1)) : 1;
  const TileLoops& loops = Int8Loops();
  auto task = [&](int64_t, int64_t first, int64_t last) {
    const int64_t size = (together - 1) * plane + rows * pitch + kPast;
    uint8_t* const room = reinterpret_cast<uint8_t*>(Scratch::Words().Get(CeilDiv(3 * size, sizeof(Word))));
    uint8_t* const padded = room + 2 * size;
    for (int64_t p = first; p < last; p += together) {
      const int64_t count = std::min(together, last - p);
      for (int64_t out = 0; out < out_height; out += band) {
        const int64_t some = std::min(band, out_height - out), top = out * stride - window.pads[0];
        if (pads) {
          memset(padded, 0, count * plane);
          const int64_t begin = std::max<int64_t>(0, -top), end = std::min(rows, height - top);
          for (int64_t k = 0; k < count; ++k)
            loops.copy_bytes(x + ((p + k) * height + top + begin) * width, width, end - begin, width,
                             padded + k * plane + begin * pitch + window.pads[1], pitch);
        }
        const uint8_t* const from = pads ? padded : x + (p * height + top) * width;
        loops.max_pool({from, count, plane, pitch, y + (p * out_height + out) * out_width, out_height * out_width, some,
                        out_width, {window.kernel[0], window.kernel[1]}, {window.strides[0], window.strides[1]}, room});
      }
    }
  };
  RunTasks(parallel, 1, planes, 1, static_cast<double>(planes) * height * width, task);
}

}  // namespace slrc
