// Where the parts of a channel stand in what tiles read.
#include <algorithm>

#include "conv_layout.h"

namespace slrc {
namespace {

// Of a tile's copy, the floats of one row of a phase, in whole vectors.
int64_t TileRow(const Phase& phase, int64_t widest) { return RoundUp(widest + phase.column.reach, Loops().lanes); }

}  // namespace

std::vector<Phase> PhasesRead(const Axis& rows, const Axis& columns) {
  std::vector<Phase> phases;
  for (const AxisPhase& row : rows.phases)
    for (const AxisPhase& column : columns.phases) phases.push_back({row, column});
  return phases;
}

int64_t WidestTile(const Weight& weight, const Axis& rows, const Axis& columns) {
  return WidestPiece(weight, (rows.out - 1) * columns.pitch + columns.out);
}

int64_t TileReads(const Axis& rows, const Axis& columns, int64_t widest) {
  int64_t floats = 0;
  for (const Phase& phase : PhasesRead(rows, columns)) {
    const int64_t row = TileRow(phase, widest);
    const int64_t all = std::max(row, widest + phase.column.reach + phase.row.reach * columns.pitch);
    floats += std::min((phase.row.reach + 1) * (row + 16), all + 16);
  }
  return floats;
}

// Of each phase: the rows that a tile reads, side by side; or all from the first to the last, if that is less.
Store StoreTiles(const Axis& rows, const Axis& columns, int64_t widest, bool pointwise) {
  Store store = {columns.pitch, 0, PhasesRead(rows, columns), widest};
  for (Phase& phase : store.phases) {
    const int64_t row = TileRow(phase, widest), apart = (phase.row.reach + 1) * row;
    const int64_t all = std::max(row, widest + phase.column.reach + phase.row.reach * columns.pitch);
    phase.apart = apart < all;
    phase.at = store.floats;
    phase.pitch = phase.apart ? row : columns.pitch;
    store.floats += std::min(apart, all);
  }
  if (!pointwise) store.floats += Loops().lanes;  // for what a copy writes past its last run
  return store;
}

int64_t Room(Reading reading, int64_t first) {
  return reading == Reading::kRows ? RoundUp(first, Loops().lanes) : first;
}

int64_t PlanePitch(Reading reading, const Axis& columns) {
  return reading == Reading::kRows ? RoundUp(columns.pitch, Loops().lanes) : columns.pitch;
}

Store StorePlanes(Reading reading, const Axis& rows, const Axis& columns, int64_t band_rows) {
  const int64_t pitch = PlanePitch(reading, columns);
  Store store = {pitch, 0, PhasesRead(rows, columns)};
  for (Phase& phase : store.phases) {
    const int64_t first = columns.First(phase.column.phase), room = Room(reading, first);
    phase.pitch = pitch;
    phase.at = store.floats + room - first;
    store.floats += room + (band_rows + rows.reach) * pitch;
    store.floats += Loops().lanes;  // for what a copy writes past its last run
  }
  return store;
}

}  // namespace slrc
