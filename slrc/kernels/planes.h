#pragma once

#include "parallel.h"

namespace slrc {

// y (n, c, h / 2, w / 2) = the maxima of 2 x 2 windows of x (n, c, h, w), side by side.
void MaxPool2x2(const float* x, const int64_t shape[4], float* y, const Parallel& parallel);

// y (n, c, 2 h, 2 w) = x (n, c, h, w) at twice the size, bilinear between the centers of pixels; the outermost go on
// beyond the image.
void UpsampleBilinear2x(const float* x, const int64_t shape[4], float* y, const Parallel& parallel);

// y (n, c, h, w) = x (n, h, w, c), and back.
void ChannelsFirst(const float* x, const int64_t shape[4], float* y, const Parallel& parallel);
void ChannelsLast(const float* x, const int64_t shape[4], float* y, const Parallel& parallel);

// y (n, c, block h, block w) = x (n, block block c, h, w), whose phases go between each other (ONNX's mode DCR).
void DepthToSpace(const float* x, const int64_t shape[4], int64_t block, float* y, const Parallel& parallel);

}  // namespace slrc
