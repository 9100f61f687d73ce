// What a convolution copies of its input: runs, the same for every channel (see CopyJob).
#include <algorithm>

#include "conv_layout.h"

namespace slrc {
namespace {

// Collects the runs of one band after the other.
class RunList {
 public:
  explicit RunList(const Geometry& geometry) : rows_(geometry.rows), columns_(geometry.columns) {}

  void BeginBand() { copies_.begins.push_back(copies_.runs.size()); }

  CopyRun* Add(int64_t from, int64_t to, int64_t floats, int64_t written) {
    copies_.runs.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), static_cast<int32_t>(floats),
                            static_cast<int32_t>(written)});
    return &copies_.runs.back();
  }
  void AddZeros(int64_t to, int64_t floats) {
    if (floats) Add(0, to, 0, floats);
  }
  // Adds `count` pixels from `flat` on of a plane with rows `pitch` apart.
  void AddPixels(const Phase& phase, int64_t pitch, int64_t flat, int64_t count, int64_t to);

  // First all zeros: written past a channel's end, they would be in the next one's way.
  void PutZerosFirst() {
    std::stable_partition(copies_.runs.begin() + copies_.begins.back(), copies_.runs.end(),
                          [](const CopyRun& run) { return run.floats == 0; });
  }

  Copies Take() {
    BeginBand();
    return std::move(copies_);
  }

 private:
  // Adds to the last run if it goes on with these, else a run.
  void Append(int64_t from, int64_t to, int64_t count);

  const Axis &rows_, &columns_;
  Copies copies_;
};

void RunList::AddPixels(const Phase& phase, int64_t pitch, int64_t flat, int64_t count, int64_t to) {
  const int64_t begin = columns_.First(phase.column.phase), end = columns_.End(phase.column.phase);
  while (count > 0) {
    const int64_t row = flat / pitch * rows_.stride + phase.row.phase - rows_.pad, column = flat % pitch;
    const bool inside = row >= 0 && row < rows_.in;
    int64_t from = -1, until = pitch;
    if (inside && column < begin) until = begin;
    if (inside && column >= begin && column < end) {
      from = row * columns_.in + column * columns_.stride + phase.column.phase - columns_.pad;
      until = end;
    }
    const int64_t some = std::min(until - column, count);
    Append(from, to, some);
    flat += some;
    to += some;
    count -= some;
  }
}

void RunList::Append(int64_t from, int64_t to, int64_t count) {
  const bool is_first = copies_.runs.size() == copies_.begins.back();
  CopyRun* const run = is_first ? nullptr : &copies_.runs.back();
  if (from < 0 && run && run->to + run->written == to)
    run->written += static_cast<int32_t>(count);
  else if (from < 0)
    AddZeros(to, count);
  else if (run && run->from + run->floats * columns_.stride == from && run->to + run->floats == to &&
           run->written == run->floats)
    run->written = run->floats += static_cast<int32_t>(count);
  else
    Add(from, to, count, count);
}

}  // namespace

Copies CopyTiles(const Geometry& g, const std::vector<Piece>& pieces, const Bands& bands) {
  RunList runs(g);
  const int64_t pitch = g.store.pitch, count = static_cast<int64_t>(pieces.size());
  for (int64_t b = 0; b < bands.count; ++b) {
    runs.BeginBand();
    for (int64_t i = b * bands.size; i < std::min(count, (b + 1) * bands.size); ++i)
      for (const Phase& phase : g.store.phases) {
        const int64_t to = (i - b * bands.size) * g.PanelChannels() * g.store.floats + phase.at;
        const int64_t row = g.store.widest + phase.column.reach;
        if (!phase.apart)
          runs.AddPixels(phase, pitch, pieces[i].start, row + phase.row.reach * pitch, to);
        for (int64_t r = 0; phase.apart && r <= phase.row.reach; ++r)
          runs.AddPixels(phase, pitch, pieces[i].start + r * pitch, row, to + r * phase.pitch);
      }
    runs.PutZerosFirst();
  }
  return runs.Take();
}

// By rows, each with its right padding, which is the next one's left padding, too.
Copies CopyPlanes(const Geometry& g, const Bands& bands) {
  RunList runs(g);
  const Axis &rows = g.rows, &columns = g.columns;
  const int64_t pitch = g.store.pitch, height = bands.size + rows.reach;
  for (int64_t b = 0; b < bands.count; ++b) {
    runs.BeginBand();
    for (const Phase& phase : g.store.phases) {
      const int64_t first = columns.First(phase.column.phase), count = columns.End(phase.column.phase) - first;
      const auto row_of = [&](int64_t r) { return (b * bands.size + r) * rows.stride + phase.row.phase - rows.pad; };
      int64_t top = 0, bottom = height;  // the rows that come from the input
      while (top < height && row_of(top) < 0) ++top;
      while (bottom > top && (!count || row_of(bottom - 1) >= rows.in)) --bottom;
      const int64_t begin = phase.at + first, room = Room(g.reading, first);
      runs.AddZeros(begin - room, room + top * pitch);
      if (top < bottom) {
        const int64_t column = first * columns.stride + phase.column.phase - columns.pad;
        CopyRun* const run = runs.Add(row_of(top) * columns.in + column, begin + top * pitch, count, pitch);
        run->rows = static_cast<int32_t>(bottom - top);
        run->from_step = static_cast<int32_t>(rows.stride * columns.in);
        run->to_step = static_cast<int32_t>(pitch);
      }
      runs.AddZeros(begin + bottom * pitch, (height - bottom) * pitch + Loops().lanes);
    }
  }
  return runs.Take();
}

}  // namespace slrc
