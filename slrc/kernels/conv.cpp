// Convolutions: their layouts, and those of float32.
#include "conv.h"

#include <algorithm>

#include "conv_run.h"

namespace slrc {
namespace {

constexpr size_t kLayoutsKept = 8;

// Sums are outputs.
struct PlaneOutput : PlanePlaces {
  float* y;
  const float* residual;

  PlaneOutput(const PlanePlaces& places, float* y, const float* residual)
      : PlanePlaces(places), y(y), residual(residual) {}

  bool Find(int64_t channel, const Piece& piece, Place* place) const {
    const int64_t row = piece.start / pitch, column = piece.start % pitch;
    const int64_t here = at + channel * channel_stride + row * width + std::min(column, width);
    *place = {y + here, residual ? residual + here : nullptr, channel_stride, width, 1, nullptr};
    if (column + piece.width <= width || (may_stand_out && piece.repeats > 1)) return true;
    place->outputs = piece.outputs;
    return piece.outputs;
  }

  void Gather(int64_t channel, int64_t channels, const Piece& piece, float* sums) const {
    ForRuns(piece, [&](int64_t first, int64_t p, int64_t count) {
      Loops().copy_rows(residual + channel * channel_stride + first, channel_stride, channels, count, sums + p,
                        piece.repeats * piece.width);
    });
  }

  void Scatter(int64_t channel, int64_t channels, const Piece& piece, const float* sums) const {
    ForRuns(piece, [&](int64_t first, int64_t p, int64_t count) {
      Loops().copy_rows(sums + p, piece.repeats * piece.width, channels, count, y + channel * channel_stride + first,
                        channel_stride);
    });
  }
};

}  // namespace

Conv::Conv(Weight weight, const SlrcWindow& window)
    : window_(window),
      out_channels_(weight.out_channels),
      by_channel_(std::make_shared<const Weight>(std::move(weight))) {
  CheckWindow(window);
}

Conv::~Conv() = default;

void Conv::OutputShape(const int64_t x_shape[4], int64_t y_shape[4]) const {
  slrc::OutputShape(window_, out_channels_, x_shape, y_shape);
}

// Only a weight whose columns rise is sorted by tap (see ChooseGeometry), so either order gives the other one back.
std::shared_ptr<const Weight> Conv::WeightInOrder(bool by_tap) const {
  if (by_tap && !by_tap_)
    by_tap_ = std::make_shared<const Weight>(
        by_channel_->SortedBy([this](int32_t column) { return TapOrder(window_, column); }));
  if (!by_tap && !by_channel_)
    by_channel_ = std::make_shared<const Weight>(by_tap_->SortedBy([](int32_t column) { return column; }));
  return by_tap ? by_tap_ : by_channel_;
}

std::shared_ptr<const Layout> Conv::FindLayout(const int64_t x_shape[4]) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& layout : layouts_) {
    const Geometry& g = layout->geometry;
    if (g.channels == x_shape[1] && g.rows.in == x_shape[2] && g.columns.in == x_shape[3]) return layout;
  }
  const Geometry geometry = ChooseGeometry(by_channel_ ? *by_channel_ : *by_tap_, window_, x_shape);
  auto weight = WeightInOrder(WantsTapOrder(geometry.reading));
  auto made = std::make_shared<const Layout>(geometry, std::move(weight), window_);
  if (layouts_.size() == kLayoutsKept) layouts_.erase(layouts_.begin());
  layouts_.push_back(made);
  for (auto* order : {&by_channel_, &by_tap_}) {
    const auto uses = [order](const auto& layout) { return layout->weight == *order; };
    if (std::none_of(layouts_.begin(), layouts_.end(), uses)) order->reset();
  }
  return made;
}

void FloatConv::Run(const float* x, const int64_t x_shape[4], const float* residual, float* y,
                    const Parallel& parallel) const {
  conv_.Run(x, x_shape, [=](const PlanePlaces& places) { return PlaneOutput{places, y, residual}; }, parallel);
}

}  // namespace slrc
