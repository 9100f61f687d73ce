// The maxima of windows of bytes, in the layout of the convolutions, which runtimes are slow on.
#pragma once

#include "parallel.h"

namespace slrc {

// Throws Error if a window may stand on padding alone, or the library has no loops for bytes.
void CheckPool(const SlrcWindow& window);
// y is of the shape that OutputShape says. The window's dilations and group are one.
void MaxPoolBytes(const uint8_t* x, const int64_t x_shape[4], const SlrcWindow& window, uint8_t* y,
                  const Parallel& parallel);

}  // namespace slrc
