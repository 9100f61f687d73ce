#include "byte_pool.h"

#include "window.h"

namespace slrc {

void CheckPool(const SlrcWindow& window) {
  CheckWindow(window);
  Int8Loops();  // a library without them says so now
  for (int axis = 0; axis < 4; ++axis)
    if (window.pads[axis] >= window.kernel[axis % 2]) throw Error("pads of a pool must be less than its kernel's size");
}

void MaxPoolBytes(const uint8_t* x, const int64_t x_shape[4], const SlrcWindow& window, uint8_t* y,
                  const Parallel& parallel) {
  const int64_t plane_shape[4] = {1, 1, x_shape[2], x_shape[3]};
  CheckInput(window, plane_shape);
  const int64_t planes = x_shape[0] * x_shape[1], height = x_shape[2], width = x_shape[3];
  const int64_t out_height = OutputSize(window, 0, height), out_width = OutputSize(window, 1, width);
  const int64_t read = (out_width - 1) * window.strides[1] + window.kernel[1];
  auto task = [&](int64_t, int64_t first, int64_t last) {
    uint8_t* const room = reinterpret_cast<uint8_t*>(Scratch::Words().Get(CeilDiv(2 * read + 1, sizeof(Word))));
    for (int64_t p = first; p < last; ++p)
      Int8Loops().max_pool({x + p * height * width, height, width, y + p * out_height * out_width, out_height,
                            out_width, {window.kernel[0], window.kernel[1]}, {window.strides[0], window.strides[1]},
                            window.pads[0], window.pads[1], room});
  };
  RunTasks(parallel, 1, planes, 1, static_cast<double>(planes) * height * width, task);
}

}  // namespace slrc
