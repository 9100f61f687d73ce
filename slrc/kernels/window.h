// The window of a convolution: what it reads of its input, in each dimension and in each phase of a stride.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "block_sparse.h"
#include "limits.h"

namespace slrc {

inline int64_t Product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw Error("the shapes are too large");
  return product;
}

// One dimension of the window. Its taps have phases in common, those a multiple of the stride apart, or each its own
// (`alone`): its elements, one for each output, then follow those of the row before without a gap.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
  bool alone;
  int64_t reach;       // the last output of a phase reads this far past itself
  int64_t lead, tail;  // in every phase that is read, elements before `lead` and from `tail` on are zero
  int64_t pitch;       // least distance of rows that leaves what is read intact

  Axis(const SlrcWindow& window, int axis, int64_t size, bool alone = false)
      : in(size),
        kernel(window.kernel[axis]),
        stride(window.strides[axis]),
        pad(window.pads[axis]),
        dilation(window.dilations[axis]),
        alone(alone) {
    const int64_t span = (kernel - 1) * dilation + 1, padded = pad + in + window.pads[axis + 2];
    if (in < 1 || padded < span) throw Error("the window is larger than the padded input");
    out = (padded - span) / stride + 1;
    reach = Shift(kernel - 1);
    lead = std::numeric_limits<int64_t>::max();
    tail = 0;
    for (int64_t k = 0; k < kernel; ++k) {
      lead = std::min(lead, First(Phase(k)));
      tail = std::max(tail, End(Phase(k)));
    }
    pitch = std::max({tail, out + reach - lead, out});
  }

  int64_t Phases() const { return alone ? (kernel - 1) * dilation + 1 : stride; }
  int64_t Phase(int64_t tap) const { return tap * dilation % Phases(); }
  int64_t Shift(int64_t tap) const { return tap * dilation / Phases(); }
  // A phase's elements that come from the input: [First, End); element q is input q * stride + phase - pad.
  int64_t First(int64_t phase) const { return std::clamp<int64_t>(CeilDiv(pad - phase, stride), 0, out + reach); }
  int64_t End(int64_t phase) const {
    return std::clamp<int64_t>(CeilDiv(pad + in - phase, stride), First(phase), out + reach);
  }
};

struct Phase {
  int64_t row, column;
  int64_t row_reach, column_reach;  // how far its taps read past an output
  int64_t at, pitch;                // where it stands in a channel of what the tiles read, and its rows' distance there
  bool apart;                       // whether each row is copied for itself
};

inline std::vector<Phase> PhasesRead(const Axis& rows, const Axis& columns) {
  std::vector<Phase> phases;
  for (int64_t r = 0; r < rows.Phases(); ++r)
    for (int64_t c = 0; c < columns.Phases(); ++c) {
      int64_t row_reach = -1, column_reach = -1;
      for (int64_t k = 0; k < rows.kernel; ++k)
        if (rows.Phase(k) == r) row_reach = std::max(row_reach, rows.Shift(k));
      for (int64_t k = 0; k < columns.kernel; ++k)
        if (columns.Phase(k) == c) column_reach = std::max(column_reach, columns.Shift(k));
      if (row_reach >= 0 && column_reach >= 0) phases.push_back({r, c, row_reach, column_reach, 0, 0, false});
    }
  return phases;
}

inline void CheckWindow(const SlrcWindow& window) {
  auto in_range = [](int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; };
  bool good = window.group >= 1;
  for (int axis = 0; axis < 2; ++axis)
    good = good && in_range(window.kernel[axis], 1, kMostWindow) && in_range(window.strides[axis], 1, kMostStride) &&
           in_range(window.dilations[axis], 1, kMostWindow) && in_range(window.pads[axis], 0, kMostWindow) &&
           in_range(window.pads[axis + 2], 0, kMostWindow);
  if (!good)
    throw Error("kernel sizes, strides (up to 64), dilations and group must be positive, pads not negative, none huge");
}

// No layout of one channel takes more floats.
inline int64_t MostPlaneFloats(const SlrcWindow& window, const int64_t x_shape[4]) {
  int64_t floats = 1;
  for (int axis = 0; axis < 2; ++axis)
    floats = Product(floats, x_shape[2 + axis] + window.pads[axis] + window.pads[axis + 2] +
                                 kStrideMargin[axis] * window.strides[axis]);
  return floats;
}

inline void CheckInput(const SlrcWindow& window, const int64_t x_shape[4]) {
  const int64_t channels = x_shape[1], per_group = channels / window.group;
  if (channels != per_group * window.group)
    throw Error("group does not divide the input's " + std::to_string(channels) + " channels");
  CheckColumns(Product(per_group, window.kernel[0] * window.kernel[1]));
  if (Product(std::max<int64_t>(1, per_group), MostPlaneFloats(window, x_shape)) > kMostInput)
    throw Error("an input plane is too large");
}

}  // namespace slrc
