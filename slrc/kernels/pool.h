#pragma once

#include "parallel.h"

namespace slrc {

// y (n, c, h / 2, w / 2) = the maxima of 2 x 2 windows of x (n, c, h, w), side by side.
void MaxPool2x2(const float* x, const int64_t shape[4], float* y, const Parallel& parallel);

}  // namespace slrc
