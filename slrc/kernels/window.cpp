#include "window.h"

#include <algorithm>
#include <limits>

namespace slrc {

int64_t Product(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw Error("the shapes are too large");
  return product;
}

void CheckWindow(const SlrcWindow& window) {
  auto in_range = [](int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; };
  bool good = window.group >= 1;
  for (int axis = 0; axis < 2; ++axis)
    good = good && in_range(window.kernel[axis], 1, kMostWindow) && in_range(window.strides[axis], 1, kMostStride) &&
           in_range(window.dilations[axis], 1, kMostWindow) && in_range(window.pads[axis], 0, kMostWindow) &&
           in_range(window.pads[axis + 2], 0, kMostWindow);
  if (!good)
    throw Error("kernel sizes, strides (up to 64), dilations and group must be positive, pads not negative, none huge");
}

int64_t MostPlaneFloats(const SlrcWindow& window, const int64_t x_shape[4]) {
  int64_t floats = 1;
  for (int axis = 0; axis < 2; ++axis)
    floats = Product(floats, x_shape[2 + axis] + window.pads[axis] + window.pads[axis + 2] +
                                 kStrideMargin[axis] * window.strides[axis]);
  return floats;
}

void CheckInput(const SlrcWindow& window, const int64_t x_shape[4]) {
  const int64_t channels = x_shape[1], per_group = channels / window.group, some = std::max<int64_t>(1, per_group);
  if (channels != per_group * window.group)
    throw Error("group does not divide the input's " + std::to_string(channels) + " channels");
  CheckColumns(Product(some, window.kernel[0] * window.kernel[1]));
  if (Product(some, MostPlaneFloats(window, x_shape)) > kMostInput) throw Error("an input plane is too large");
}

int64_t OutputSize(const SlrcWindow& window, int axis, int64_t size) {
  const int64_t span = (window.kernel[axis] - 1) * window.dilations[axis] + 1;
  const int64_t padded = window.pads[axis] + size + window.pads[axis + 2];
  if (size < 1 || padded < span) throw Error("the window is larger than the padded input");
  return (padded - span) / window.strides[axis] + 1;
}

void OutputShape(const SlrcWindow& window, int64_t out_channels, const int64_t x_shape[4], int64_t y_shape[4]) {
  y_shape[0] = x_shape[0];
  y_shape[1] = out_channels;
  for (int axis = 0; axis < 2; ++axis) y_shape[2 + axis] = OutputSize(window, axis, x_shape[2 + axis]);
}

Axis::Axis(const SlrcWindow& window, int axis, int64_t size, bool alone)
    : in(size),
      out(OutputSize(window, axis, size)),
      kernel(window.kernel[axis]),
      stride(window.strides[axis]),
      pad(window.pads[axis]),
      dilation(window.dilations[axis]),
      alone(alone) {
  reach = Shift(kernel - 1);
  for (int64_t tap = 0; tap < kernel; ++tap) phases.push_back({Phase(tap), Shift(tap)});
  std::sort(phases.begin(), phases.end(), [](const AxisPhase& a, const AxisPhase& b) {
    return a.phase != b.phase ? a.phase < b.phase : a.reach > b.reach;
  });
  const auto same = [](const AxisPhase& a, const AxisPhase& b) { return a.phase == b.phase; };
  phases.erase(std::unique(phases.begin(), phases.end(), same), phases.end());
  lead = std::numeric_limits<int64_t>::max();
  tail = 0;
  for (const AxisPhase& read : phases) {
    lead = std::min(lead, First(read.phase));
    tail = std::max(tail, End(read.phase));
  }
  pitch = std::max({tail, out + reach - lead, out});
}

int64_t Axis::PhaseIndex(int64_t tap) const {
  const auto before = [](const AxisPhase& a, int64_t phase) { return a.phase < phase; };
  return std::lower_bound(phases.begin(), phases.end(), Phase(tap), before) - phases.begin();
}

int64_t Axis::First(int64_t phase) const {
  return std::clamp<int64_t>(CeilDiv(pad - phase, stride), 0, out + reach);
}

int64_t Axis::End(int64_t phase) const {
  return std::clamp<int64_t>(CeilDiv(pad + in - phase, stride), First(phase), out + reach);
}

}  // namespace slrc
