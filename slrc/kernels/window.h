// The window of a convolution: what it reads of its input, in each dimension and in each phase of a stride.
#pragma once

#include <vector>

#include "layer_limits.h"
#include "weight.h"

namespace slrc {

int64_t Product(int64_t a, int64_t b);

void CheckWindow(const SlrcWindow& window);
void CheckInput(const SlrcWindow& window, const int64_t x_shape[4]);
// No layout of one channel takes more floats.
int64_t MostPlaneFloats(const SlrcWindow& window, const int64_t x_shape[4]);

// Outputs along one dimension of an input of that size.
int64_t OutputSize(const SlrcWindow& window, int axis, int64_t size);

void OutputShape(const SlrcWindow& window, int64_t out_channels, const int64_t x_shape[4], int64_t y_shape[4]);

// A phase of one dimension, and how far its taps read past an output.
struct AxisPhase {
  int64_t phase, reach;
};

// One dimension of the window. Its taps have phases in common, those a multiple of the stride apart, or each its own
// (`alone`): its elements, one for each output, then follow those of the row before without a gap.
struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
  bool alone;
  int64_t reach;       // the last output of a phase reads this far past itself
  int64_t lead, tail;  // in every phase that is read, elements before `lead` and from `tail` on are zero
  int64_t pitch;       // least distance of rows that leaves what is read intact
  std::vector<AxisPhase> phases;  // that are read, in rising order

  Axis(const SlrcWindow& window, int axis, int64_t size, bool alone = false);

  int64_t Phase(int64_t tap) const { return tap * dilation % PhaseCount(); }
  int64_t Shift(int64_t tap) const { return tap * dilation / PhaseCount(); }
  // Which of `phases` a tap reads.
  int64_t PhaseIndex(int64_t tap) const;
  // A phase's elements that come from the input: [First, End); element q is input q * stride + phase - pad.
  int64_t First(int64_t phase) const;
  int64_t End(int64_t phase) const;

 private:
  int64_t PhaseCount() const { return alone ? (kernel - 1) * dilation + 1 : stride; }
};

}  // namespace slrc
