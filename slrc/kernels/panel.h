// Block rows on a panel of pixels: what convolution and matrix multiplication share. README.md draws the words.
#pragma once

#include "parallel.h"
#include "pieces.h"

namespace slrc {

// The surviving blocks of every block row, cut into `count` slices of neighbouring columns: slice k of block row r is
// starts[k * pitch + r] ... starts[(k + 1) * pitch + r] - 1.
struct Slices {
  const int32_t* starts;
  int64_t count, pitch;
};

inline Slices OneSlice(const Weight& weight) { return {weight.row_pointers.data(), 1, 1}; }

struct Panel {
  const float* x;
  const int32_t* offsets;  // for each surviving block: where its column begins, from x
  Slices slices;           // one after the other, on all pieces: what a slice reads of x stays cached
  const Piece* pieces;
  int64_t count;     // of pieces
  int64_t step;      // from one piece to the next in x; 0: a piece stands in x where it does in the panel
  int64_t together;  // how many pieces one block row may run on before the next one does
  int64_t pitch;     // from one row to the next, of pieces that are repeated
  int64_t parts;     // see Strip, for pieces that are repeated
  // Where x has a pixel more apart from the vectors before it (null: beside them): the panel's pixels, `more_step`
  // apart.
  const float* more_x = nullptr;
  const int32_t* more_offsets = nullptr;
  int64_t more_step = 0;
  const int32_t* tap_ends = nullptr;  // as in Strip, of all block rows, for pieces that have tap_lanes
  int64_t taps = 0;
  bool far = false;  // whether most of x is outside the second-level cache: the next piece's is then prefetched
  MatrixWeight matrix = {};
};

// Where a piece stands in y and the residual (null if there is none): channels `pitch` apart, its repeats `row`, its
// pixels `pixel`.
struct Place {
  float* y;
  const float* residual;
  int64_t pitch, row, pixel;
  const Outputs* outputs;  // as in Strip
};

constexpr int64_t kPartSums = 3 * 1024;
constexpr int64_t kGatheredWords = 24 * 1024;  // at a time

// See RunPanel.
template <class Output>
class PanelLoop {
 public:
  PanelLoop(const Weight& weight, int64_t first, int64_t last, const Panel& panel, const Output& output);
  void Run();

 private:
  void BeginSlice(int64_t slice);
  // Runs block rows on the index-th piece, and on some after it if one strip can; returns on how many. `waiting` are
  // the piece's sums between slices.
  int64_t RunPieces(int64_t index, float* waiting);
  void RunParts(const Piece& piece, StripLoop loop, Word* sums);
  // Returns the room that a piece takes for matrix registers.
  int64_t GatheredWords(const Piece& piece) const {
    return ProductsOf(panel_.matrix.columns) * kMatrixColumns * piece.vectors * loops_.lanes;
  }
  bool MayFollow(const Piece& piece) const;
  int64_t CountTogether(int64_t index) const;
  void SetReads(int64_t index, const Piece& piece, int64_t together);
  void SetMore(const Piece& piece, const Place& place, bool direct);

  // The pixels of a piece that have sums, and how far a pixel more stands after the others.
  static int64_t Vectors(const Piece& piece) { return piece.width - (piece.ending == kPixelMore); }
  static int64_t SumsWidth(const Piece& piece) {
    return piece.repeats * (Output::kMoreApart ? Vectors(piece) : piece.width);
  }

  const Weight& weight_;
  const Panel& panel_;
  const Output& output_;
  const TileLoops& loops_;
  const int wide_;  // which loops
  const int64_t first_, channel_;
  const bool sliced_;  // the sums of all pieces wait for the next slice
  bool is_first_slice_ = true, is_last_slice_ = true;
  Strip strip_ = {};
};

template <class Output>
PanelLoop<Output>::PanelLoop(const Weight& weight, int64_t first, int64_t last, const Panel& panel,
                             const Output& output)
    : weight_(weight),
      panel_(panel),
      output_(output),
      loops_(*weight.loops),
      wide_(LoopsFor(loops_, weight.block)),
      first_(first),
      channel_(weight.FirstChannel(first)),
      sliced_(panel.slices.count > 1) {
  strip_.values = weight.values.data();
  strip_.offsets = panel.offsets;
  strip_.block = weight.block;
  strip_.value_step = weight.ValueStep();
  strip_.channels = weight.FirstChannel(last) - channel_;
  strip_.slope = weight.slope;
  strip_.padding = weight.padding;
  strip_.taps = panel.taps;
  strip_.tap_ends = panel.tap_ends ? panel.tap_ends + first * panel.taps : nullptr;
  strip_.more.offsets = panel.more_x ? panel.more_offsets : panel.offsets;
}

template <class Output>
void PanelLoop<Output>::Run() {
  float* all_sums = nullptr;
  if (sliced_) {
    int64_t width = 0;
    for (int64_t i = 0; i < panel_.count; ++i) width += SumsWidth(panel_.pieces[i]);
    all_sums = Scratch::Sums().Get(strip_.channels * width);
  }
  for (int64_t slice = 0; slice < panel_.slices.count; ++slice) {
    BeginSlice(slice);
    float* waiting = all_sums;
    for (int64_t i = 0; i < panel_.count;) {
      const int64_t width = sliced_ ? SumsWidth(panel_.pieces[i]) : 0;
      i += RunPieces(i, waiting);
      waiting += strip_.channels * width;
    }
  }
}

template <class Output>
void PanelLoop<Output>::BeginSlice(int64_t slice) {
  is_first_slice_ = slice == 0;
  is_last_slice_ = slice + 1 == panel_.slices.count;
  strip_.begins = panel_.slices.starts + slice * panel_.slices.pitch + first_;
  strip_.ends = strip_.begins + panel_.slices.pitch;
  strip_.bias = is_first_slice_ ? weight_.bias.data() + first_ * weight_.block : nullptr;
  strip_.activation = is_last_slice_ ? weight_.activation : kNone;
}

template <class Output>
int64_t PanelLoop<Output>::RunPieces(int64_t index, float* waiting) {
  const Piece& piece = panel_.pieces[index];
  const int64_t width = SumsWidth(piece);
  Place place;
  const bool direct = output_.Find(channel_, piece, &place);
  float* const sums = sliced_ ? waiting : direct ? nullptr : Scratch::Sums().Get(strip_.channels * width);
  const bool alone = sliced_ || piece.tap_lanes || piece.repeats > 1 || !MayFollow(piece);
  const int64_t together = alone ? 1 : CountTogether(index);
  SetReads(index, piece, together);
  strip_.y_step = direct && piece.repeats > 1 ? place.row : piece.width;
  strip_.outputs = direct ? place.outputs : nullptr;

  strip_.start = place.residual;
  strip_.start_pitch = place.pitch;
  if (!is_first_slice_ || (place.residual && !direct)) {
    if (is_first_slice_) output_.Gather(channel_, strip_.channels, piece, sums);
    strip_.start = sums;
    strip_.start_pitch = width;
  }
  const bool done = is_last_slice_ && direct;
  strip_.y = done ? place.y : sums;
  strip_.pitch = done ? place.pitch : width;
  SetMore(piece, place, direct);
  const StripLoop loop = piece.vectors ? loops_.strip[piece.ending][wide_][piece.vectors - 1] : loops_.pixel[wide_];
  if constexpr (Output::kInParts)
    if (!sliced_) {
      RunParts(piece, loop, sums);
      return together;
    }
  loop(strip_);
  if (is_last_slice_ && !direct) output_.Scatter(channel_, strip_.channels, piece, sums);
  return together;
}

// Where results do not stand side by side, some block rows at a time: what is scattered is in the first-level cache.
template <class Output>
void PanelLoop<Output>::RunParts(const Piece& piece, StripLoop loop, Word* sums) {
  const int64_t rows = std::max<int64_t>(1, kPartSums / (SumsWidth(piece) * strip_.block));
  const bool by_matrix = panel_.matrix.columns && output_.IsFused(piece);
  const int64_t step = by_matrix || output_.IsInPlace(piece) ? strip_.channels : rows * strip_.block;
  if (by_matrix) {
    loop = loops_.matrix->strip[piece.ending][piece.vectors - 1];
    strip_.matrix = &panel_.matrix;
    strip_.gathered = Scratch::Hidden().Get(strip_.runs * GatheredWords(piece));
  }
  for (int64_t first = 0; first < strip_.channels; first += step) {
    const int64_t channel = channel_ + first;
    Strip part = strip_;
    part.begins += first / strip_.block;
    part.ends += first / strip_.block;
    part.bias += first;
    if (part.tap_ends) part.tap_ends += first / strip_.block * strip_.taps;
    part.channels = std::min(step, strip_.channels - first);
    Int8Results results;
    if (output_.BeginResults(channel, part.channels, piece, sums, &results)) part.results = &results;
    loop(part);
    if (part.results) output_.EndResults(channel, part.channels, piece, results);
    else output_.Scatter(channel, part.channels, piece, sums);
  }
}

// Whether tiles write a piece where it belongs, as wide as they are, so that another one may follow in the same strip.
template <class Output>
bool PanelLoop<Output>::MayFollow(const Piece& piece) const {
  if constexpr (Output::kInParts) return piece.pixels == piece.width && output_.IsInPlace(piece);
  Place place;
  return output_.Find(channel_, piece, &place) && !place.outputs;
}

// Returns how many pieces from the index-th on are alike, one after the other, and may be written where they belong.
template <class Output>
int64_t PanelLoop<Output>::CountTogether(int64_t index) const {
  const Piece* const pieces = panel_.pieces + index;
  int64_t most = std::min(panel_.together, panel_.count - index);
  if (panel_.matrix.columns) most = std::min(most, std::max<int64_t>(1, kGatheredWords / GatheredWords(*pieces)));
  int64_t count = 1;
  for (; count < most; ++count) {
    const Piece &piece = pieces[count], &before = pieces[count - 1];
    const bool follows = piece.start == before.start + before.width && piece.vectors == before.vectors &&
                         piece.ending == before.ending && !piece.tap_lanes;
    if (!follows || !MayFollow(piece)) break;
  }
  return count;
}

template <class Output>
void PanelLoop<Output>::SetReads(int64_t index, const Piece& piece, int64_t together) {
  const bool repeated = piece.repeats > 1;
  strip_.x = panel_.x + (panel_.step ? index * panel_.step : piece.start);
  strip_.runs = repeated ? piece.repeats : together;
  strip_.x_step = repeated ? panel_.pitch : panel_.step ? panel_.step : piece.width;
  strip_.parts = repeated ? panel_.parts : 1;
  strip_.ahead = panel_.far ? piece.width : 0;
  strip_.tap_lanes = piece.tap_lanes;
  strip_.tap_lanes_count = piece.tap_lanes_count;
}

template <class Output>
void PanelLoop<Output>::SetMore(const Piece& piece, const Place& place, bool direct) {
  const int64_t vectors = Vectors(piece);
  PixelMore& more = strip_.more;
  more.x = panel_.more_x ? panel_.more_x + (piece.start + vectors) * panel_.more_step : strip_.x + vectors;
  if (Output::kMoreApart) {
    more.y = place.y + vectors * place.pixel;
    more.start = place.residual ? place.residual + vectors * place.pixel : nullptr;
    more.start_pitch = more.pitch = place.pitch;
    return;
  }
  // Of a piece with gaps, the outputs among the vectors stand side by side before it.
  const Outputs* const outputs = direct && piece.ending == kPixelMore ? place.outputs : nullptr;
  const int64_t at = outputs ? outputs->at[piece.vectors] : vectors;
  const bool has_start = strip_.start && (!outputs || outputs->kept[piece.vectors]);
  more.y = strip_.y + at;
  more.start = has_start ? strip_.start + at : nullptr;
  more.start_pitch = strip_.start_pitch;
  more.pitch = strip_.pitch;
}

// Computes block rows [first, last), of one group or of groups that they fill, on a panel. Output finds the place of a
// piece, and says whether a tile may be written there; if not, it gathers the residual and scatters sums that are
// (channels, repeats, piece.width). If `Output::kMoreApart`, a pixel more is written to its place in any case, and no
// sums have it. If `Output::kInParts`, sums become bytes. BeginResults says whether tiles make those themselves, and
// where to: to y, if they stand side by side there (IsInPlace), or to its `room` of a word for each sum, in which the
// residual is put, too, and from which EndResults copies them. Other sums are scattered.
template <class Output>
void RunPanel(const Weight& weight, int64_t first, int64_t last, const Panel& panel, const Output& output) {
  PanelLoop<Output>(weight, first, last, panel, output).Run();
}

}  // namespace slrc
