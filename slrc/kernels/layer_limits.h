// What the kernels take. limits.py says the same of a layer before it is packed; a test holds that the two agree.
#pragma once

#include <stdint.h>

namespace slrc {

constexpr int64_t kQuad = 4;       // input channels of an int8 column
constexpr int64_t kMostAlong = 4;  // stride of a depthwise int8 layer along a row, whose dilation is 1
constexpr int64_t kMostDepthwise = 1 << 10;  // taps of one
constexpr int64_t kMostStride = 64;
constexpr int64_t kMostWindow = 1 << 15;   // of a kernel's size, a dilation and a padding
constexpr int64_t kMostColumns = 1 << 24;  // a column times the tokens of a panel is an int32
constexpr int64_t kMostBlocks = (1 << 27) - 1;
constexpr int64_t kMostChannels = INT32_MAX;

// Of a group's input, in floats, so that offsets in a plane are int32. A plane has up to strides[0] x strides[1]
// phases; each may need so many rows and columns more than its share of the padded input: for rounding up to whole
// elements and vectors, for the room before its first row and for what a copy writes past its last one.
constexpr int64_t kMostInput = 1 << 30;
constexpr int64_t kStrideMargin[2] = {3, 17};

}  // namespace slrc
