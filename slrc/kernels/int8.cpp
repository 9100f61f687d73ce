#include "int8.h"

#include "conv_run.h"
#include "gemm_run.h"
#include "layer_limits.h"

namespace slrc {
namespace {

// Sums of a piece are results once they are complete, never before: none is written where it belongs.
struct Int8PlaneOutput : PlanePlaces {
  static constexpr bool kInParts = true;
  const Int8Rule& rule;
  const uint8_t* residual;
  void* y;
  const bool masks = Int8Loops().masks;

  Int8PlaneOutput(const PlanePlaces& places, const Int8Rule& rule, const uint8_t* residual, void* y)
      : PlanePlaces(places), rule(rule), residual(residual), y(y) {}

  bool Find(int64_t, const Piece&, Place* place) const {
    *place = {};
    return false;
  }
  void Gather(int64_t, int64_t, const Piece&, Word*) const {}
  void Scatter(int64_t channel, int64_t channels, const Piece& piece, const Word* sums) const {
    ForRuns(piece, [&](int64_t first, int64_t p, int64_t count) {
      Int8Results job = rule.At(channel, false, channel * channel_stride + first, residual, y);
      job.sums = sums + p;
      job.sums_pitch = piece.repeats * piece.width;
      job.pitch = channel_stride;
      job.rows = channels;
      job.count = count;
      Int8Loops().results(job);
    });
  }
  bool IsFused(const Piece& piece) const { return !rule.is_float() && piece.vectors && piece.repeats == 1; }
  bool IsInPlace(const Piece& piece) const {
    const bool stands_out = piece.start % pitch + piece.pixels > width;
    return IsFused(piece) && !stands_out && (piece.pixels == piece.width || masks);
  }
  // Says where results go that tiles make themselves: to their place, or to `room`, where the residual is brought too.
  bool BeginResults(int64_t channel, int64_t channels, const Piece& piece, Word* room, Int8Results* job) const {
    if (!IsFused(piece)) return false;
    if (IsInPlace(piece)) {
      const int64_t row = piece.start / pitch, column = piece.start % pitch;
      *job = rule.At(channel, false, channel * channel_stride + at + row * width + column, residual, y);
      job->pitch = channel_stride;
      job->count = piece.pixels;
      return true;
    }
    uint8_t *const results = reinterpret_cast<uint8_t*>(room), *const gathered = results + channels * piece.width;
    *job = rule.At(channel, false, 0, residual ? gathered : nullptr, results);
    job->pitch = job->count = piece.width;
    if (residual)
      ForRuns(piece, [&](int64_t first, int64_t p, int64_t count) {
        Int8Loops().copy_bytes(residual + channel * channel_stride + first, channel_stride, channels, count,
                               gathered + p, piece.width);
      });
    return true;
  }
  void EndResults(int64_t channel, int64_t channels, const Piece& piece, const Int8Results& job) const {
    if (IsInPlace(piece)) return;
    ForRuns(piece, [&](int64_t first, int64_t p, int64_t count) {
      Int8Loops().copy_bytes(job.y + p, piece.width, channels, count,
                             static_cast<uint8_t*>(y) + channel * channel_stride + first, channel_stride);
    });
  }
};

// y is (tokens, channels), the tile (rows, tokens).
struct Int8TokenOutput {
  static constexpr bool kMoreApart = false, kInParts = true;
  const Int8Rule& rule;
  const uint8_t* residual;
  void* y;
  int64_t channels;
  int64_t token;  // the first one's

  Int8TokenOutput From(int64_t other) const { return {rule, residual, y, channels, other}; }
  bool Find(int64_t, const Piece&, Place* place) const {
    *place = {};
    return false;
  }
  void Gather(int64_t, int64_t, const Piece&, Word*) const {}
  void Scatter(int64_t channel, int64_t count, const Piece& piece, const Word* sums) const {
    Word* const turned = Scratch::Hidden().Get(piece.pixels * count);
    Loops().transpose(sums, piece.width, count, piece.pixels, turned, count);
    Int8Results job = rule.At(channel, true, (token + piece.start) * channels + channel, residual, y);
    job.sums = turned;
    job.sums_pitch = job.count = count;
    job.pitch = channels;
    job.rows = piece.pixels;
    Int8Loops().results(job);
  }
  bool IsFused(const Piece&) const { return false; }
  bool IsInPlace(const Piece&) const { return false; }
  bool BeginResults(int64_t, int64_t, const Piece&, Word*, Int8Results*) const { return false; }
  void EndResults(int64_t, int64_t, const Piece&, const Int8Results&) const {}
};

const SlrcInt8Blocks& Checked(const SlrcInt8Blocks& blocks, int64_t group) {
  CheckInt8(blocks, group);
  return blocks;
}

Weight ProductWeight(const SlrcInt8Blocks& blocks) {
  if (blocks.block == 1) throw Error("blocks of 1 output are for depthwise layers");
  return Weight(blocks, 1);
}

}  // namespace

Int8Results Int8Rule::At(int64_t channel, bool by_lane, int64_t at, const uint8_t* residual, void* y) const {
  Int8Results job = {};
  job.scale = scale_.data() + channel;
  job.by_lane = by_lane;
  job.residual = residual ? residual + at : nullptr;
  if (is_float_) job.y_float = static_cast<float*>(y) + at;
  else job.y = static_cast<uint8_t*>(y) + at;
  job.residual_scale = residual_scale_;
  job.slope = slope_;
  job.residual_zero_point = residual_zero_point_;
  job.y_zero_point = y_zero_point_;
  return job;
}

Int8Conv::Int8Conv(const SlrcInt8Blocks& blocks, const SlrcWindow& window)
    : window_(window),
      out_channels_(blocks.out_channels),
      filling_(static_cast<uint8_t>(blocks.x_zero_point)),
      rule_(Checked(blocks, window.group)) {
  if (blocks.block == 1) depthwise_ = std::make_unique<const Int8Depthwise>(blocks, window);
  else conv_ = std::make_unique<const Conv>(Weight(blocks, window.group), window);
}

void Int8Conv::Run(const uint8_t* x, const int64_t x_shape[4], const uint8_t* residual, void* y,
                   const Parallel& parallel) const {
  if (depthwise_) return depthwise_->Run(x, x_shape, rule_, residual, y, parallel);
  const int64_t images = x_shape[0], channels = x_shape[1], pixels = x_shape[2] * x_shape[3];
  const int64_t group = window_.group, per_group = channels / group, quads = CeilDiv(per_group, kQuad);
  if (per_group * group != channels)
    throw Error("group does not divide the input's " + std::to_string(channels) + " channels");
  Word* const words = Scratch::Words().Get(images * group * quads * pixels + kMaxLanes);
  const TileLoops& loops = Int8Loops();
  const double work = static_cast<double>(images * channels) * pixels;
  RunTasks(parallel, images * group, quads, 1, work, [&](int64_t panel, int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q)
      loops.interleave(x + (panel * per_group + q * kQuad) * pixels, pixels, std::min(kQuad, per_group - q * kQuad),
                       pixels, filling_, words + (panel * quads + q) * pixels);
  });
  const int64_t in_words[4] = {images, group * quads, x_shape[2], x_shape[3]};
  const auto output = [&](const PlanePlaces& places) { return Int8PlaneOutput(places, rule_, residual, y); };
  conv_->Run(words, in_words, output, parallel);
}

Int8Gemm::Int8Gemm(const SlrcInt8Blocks& blocks)
    : filling_(static_cast<uint8_t>(blocks.x_zero_point)), gemm_(ProductWeight(blocks)), rule_(blocks) {}

void Int8Gemm::Run(const uint8_t* x, int64_t rows, int64_t inputs, const uint8_t* residual, void* y,
                   const Parallel& parallel) const {
  const int64_t quads = CeilDiv(inputs, kQuad), filling = quads * kQuad - inputs;
  CheckColumns(inputs);
  Word* const words = Scratch::Words().Get(rows * quads + kMaxLanes);
  const uint8_t flip = Int8Loops().flip;
  uint8_t* to = reinterpret_cast<uint8_t*>(words);
  for (int64_t r = 0; r < rows; ++r, x += inputs, to += quads * kQuad) {
    for (int64_t i = 0; i < inputs; ++i) to[i] = x[i] ^ flip;
    std::fill_n(to + inputs, filling, static_cast<uint8_t>(filling_ ^ flip));
  }
  gemm_.RunTokens(words, rows, quads, Int8TokenOutput{rule_, residual, y, out_channels(), 0}, parallel);
}

}  // namespace slrc
