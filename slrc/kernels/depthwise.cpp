#include "depthwise.h"

#include <string.h>

#include "int8.h"
#include "layer_limits.h"
#include "window.h"

namespace slrc {
namespace {

constexpr int64_t kSumsAtOnce = 4096;       // that are made results together, while they are cached
constexpr int64_t kBytesAtOnce = 8 * 1024;  // of planes copied together: what was just stored would be waited for
constexpr int64_t kReadPast = 4 * 64;       // bytes that loops may read past the last word that they need
constexpr int64_t kBytes = sizeof(Word);

int64_t WordsAlong(const SlrcWindow& window) { return CeilDiv(window.kernel[1], kQuad); }

// The rows and the columns of a padded plane that windows read, its rows as long as whole words need.
struct Plane {
  Plane(const SlrcWindow& window, const int64_t x_shape[4])
      : out_rows(OutputSize(window, 0, x_shape[2])),
        out_columns(OutputSize(window, 1, x_shape[3])),
        rows((out_rows - 1) * window.strides[0] + (window.kernel[0] - 1) * window.dilations[0] + 1),
        pitch((out_columns - 1) * window.strides[1] + WordsAlong(window) * kQuad),
        top(window.pads[0]),
        left(window.pads[1]),
        copied_rows(std::clamp<int64_t>(rows - top, 0, x_shape[2])),
        copied_columns(std::clamp<int64_t>(pitch - left, 0, x_shape[3])) {}
  int64_t Bytes() const { return rows * pitch + kReadPast; }

  int64_t out_rows, out_columns, rows, pitch, top, left, copied_rows, copied_columns;
};

// How much is done at once: some channels of small planes, or some rows of a large one.
struct Cut {
  Cut(const Plane& plane, int64_t pixels)
      : channels(std::max<int64_t>(1, std::min(kSumsAtOnce / pixels, kBytesAtOnce / plane.Bytes()))),
        rows(channels > 1 ? plane.out_rows
                          : std::clamp<int64_t>(kSumsAtOnce / plane.out_columns, 1, plane.out_rows)) {}
  int64_t channels, rows;
};

}  // namespace

Int8Depthwise::Int8Depthwise(const SlrcInt8Blocks& blocks, const SlrcWindow& window)
    : window_(window), zero_point_(static_cast<uint8_t>(blocks.x_zero_point)) {
  CheckWindow(window);
  if (window.strides[1] > kMostAlong || window.dilations[1] != 1)
    throw Error("a depthwise layer's stride along a row must be 1 to 4 and its dilation 1, got " +
                std::to_string(window.strides[1]) + " and " + std::to_string(window.dilations[1]));
  const Weight weight(blocks, window.group);
  out_channels_ = weight.out_channels;
  const TileLoops& loops = *weight.loops;
  const int64_t taps = window.kernel[0] * window.kernel[1], along = WordsAlong(window), words = window.kernel[0] * along;
  if (taps > kMostDepthwise)
    throw Error("a depthwise window has at most " + std::to_string(kMostDepthwise) + " columns, got " +
                std::to_string(taps));
  if (weight.largest_column >= taps)
    throw Error("column " + std::to_string(weight.largest_column) + " is out of range: a depthwise window has " +
                std::to_string(taps));
  values_.resize(out_channels_ * words * loops.value_words);
  bias_.resize(out_channels_);
  const int32_t as_read = loops.flip ? static_cast<int8_t>(zero_point_ ^ loops.flip) : zero_point_;
  std::vector<int8_t> bytes(words * kQuad);
  for (int64_t channel = 0; channel < out_channels_; ++channel) {
    uint32_t bias = blocks.bias[channel];
    std::fill(bytes.begin(), bytes.end(), 0);
    for (int64_t t = weight.row_pointers[channel]; t < weight.row_pointers[channel + 1]; ++t) {
      if (t > weight.row_pointers[channel] && weight.columns[t] <= weight.columns[t - 1])
        throw Error("columns of a depthwise layer must rise in each block row");
      const int64_t row = weight.columns[t] / window.kernel[1], column = weight.columns[t] % window.kernel[1];
      const int8_t value = blocks.values[t * kQuad];  // those behind it multiply what fills up the quad
      bytes[row * along * kQuad + column] = value;
      bias -= as_read * value;
    }
    for (int64_t w = 0; w < words; ++w)
      PutValues(&bytes[w * kQuad], 1, loops.value_words, &values_[(channel * words + w) * loops.value_words]);
    memcpy(&bias_[channel], &bias, sizeof bias);
  }
}

void Int8Depthwise::Run(const uint8_t* x, const int64_t x_shape[4], const Int8Rule& rule, const uint8_t* residual,
                        void* y, const Parallel& parallel) const {
  CheckInput(window_, x_shape);
  if (x_shape[1] != window_.group)
    throw Error("blocks of 1 output are for depthwise layers, whose groups have one input channel, got " +
                std::to_string(x_shape[1]) + " channels in " + std::to_string(window_.group) + " groups");
  const Plane plane(window_, x_shape);
  const int64_t along = WordsAlong(window_), words = window_.kernel[0] * along, channels = out_channels_;
  const int64_t pixels = plane.out_rows * plane.out_columns, in_pixels = x_shape[2] * x_shape[3];
  const int64_t multiplier = channels / window_.group;
  std::vector<int32_t> offsets(words);
  for (int64_t w = 0; w < words; ++w)
    offsets[w] = static_cast<int32_t>(w / along * window_.dilations[0] * plane.pitch + w % along * kQuad);
  const TileLoops& loops = Int8Loops();
  const double work = static_cast<double>(x_shape[0] * channels) * pixels * words;
  const Cut cut(plane, pixels);
  RunTasks(parallel, x_shape[0], channels, 1, work, [&](int64_t image, int64_t first, int64_t last) {
    const int64_t floats = CeilDiv(plane.Bytes(), kBytes), row_step = window_.strides[0] * plane.pitch;
    uint8_t* const planes = reinterpret_cast<uint8_t*>(Scratch::Words().Get(cut.channels * floats));
    Word* const sums = Scratch::Sums().Get(cut.channels * cut.rows * plane.out_columns + kMaxLanes);
    memset(planes, zero_point_, cut.channels * floats * kBytes);
    for (int64_t begin = first; begin < last; begin += cut.channels) {
      const int64_t count = std::min(cut.channels, last - begin);
      for (int64_t k = 0; k < count; ++k)
        loops.copy_bytes(x + (image * x_shape[1] + (begin + k) / multiplier) * in_pixels, x_shape[3],
                         plane.copied_rows, plane.copied_columns,
                         planes + k * floats * kBytes + plane.top * plane.pitch + plane.left, plane.pitch);
      for (int64_t row = 0; row < plane.out_rows; row += cut.rows) {
        const int64_t rows = std::min(cut.rows, plane.out_rows - row), some = rows * plane.out_columns;
        for (int64_t k = 0; k < count; ++k)
          loops.depthwise({planes + k * floats * kBytes + row * row_step, offsets.data(),
                           &values_[(begin + k) * words * loops.value_words], words, window_.strides[1], row_step, rows,
                           plane.out_columns, bias_[begin + k], sums + k * some});
        Int8Results job =
            rule.At(begin, false, (image * channels + begin) * pixels + row * plane.out_columns, residual, y);
        job.sums = sums;
        job.sums_pitch = job.count = some;
        job.pitch = pixels;
        job.rows = count;
        loops.results(job);
      }
    }
  });
}

}  // namespace slrc
