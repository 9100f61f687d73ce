// Copies, transposes, pools and upsampling of whole matrices. For tile.cpp alone.
#pragma once

#include <utility>

#include "tile_set.h"

namespace slrc {
namespace {

// In vectors of N; the last floats may be copied twice. Rows are short: a call of memcpy for each would cost more.
template <int N>
SLRC_INLINE inline void CopyRow(const float* from, float* to, int64_t floats) {
  if constexpr (N == 1) {
    for (int64_t i = 0; i < floats; ++i) to[i] = from[i];
  } else if (floats < N) {
    CopyRow<N == 4 ? 1 : N / 2>(from, to, floats);
  } else {
    for (int64_t i = 0; i + N < floats; i += N) Store<N>(to + i, Load<N>(from + i));
    Store<N>(to + floats - N, Load<N>(from + floats - N));
  }
}

void CopyEachRow(const float* from, int64_t from_pitch, int64_t rows, int64_t floats, float* to, int64_t to_pitch) {
  for (; rows > 0; --rows, from += from_pitch, to += to_pitch) CopyRow<kLanes>(from, to, floats);
}

// Lane l is lane At(l) of a and b, one after the other.
template <class Order, class V, int... L>
SLRC_INLINE inline V Shuffle(V a, V b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, Order::At(L)...);
}

// Of every four lanes the first two (or, `High`, the last two) of a and b in turn: one by one, or as pairs.
template <bool High>
struct Floats {
  static constexpr int At(int l) { return l / 4 * 4 + 2 * High + l % 4 / 2 + l % 2 * kLanes; }
};
template <bool High>
struct Pairs {
  static constexpr int At(int l) { return l / 4 * 4 + 2 * High + l % 2 + l % 4 / 2 * kLanes; }
};
// The first (last) half of a, then that of b.
template <bool High>
struct Halves {
  static constexpr int At(int l) { return l % (kLanes / 2) + High * kLanes / 2 + l / (kLanes / 2) * kLanes; }
};
// Every other four lanes of a, then those of b.
template <bool High>
struct Fours {
  static constexpr int At(int l) { return l / 4 % 2 * 8 + 4 * High + l % 4 + l / 8 * kLanes; }
};

// rows[r] and rows[r + Apart] become Order<false> and Order<true> of both, for every such pair of each 2 Apart rows.
template <template <bool> class Order, int Apart>
SLRC_INLINE inline void Stage(Lanes<kLanes>::Float (&rows)[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  Unroll<kLanes>([&](int r) SLRC_INLINE {
    if (r & Apart) return;
    const auto a = rows[r], b = rows[r + Apart];
    rows[r] = Shuffle<Order<false>>(a, b, kAll);
    rows[r + Apart] = Shuffle<Order<true>>(a, b, kAll);
  });
}

// Which column rows[r] is after TransposeSquare: bits 0 and 1 of r change places, of 16 rows also bits 2 and 3.
constexpr int ColumnOf(int r) {
  const int low = (r & 1) << 1 | (r & 2) >> 1;
  return low | (kLanes == 16 ? (r & 4) << 1 | (r & 8) >> 1 : r & 4);
}

// Transposes a square of as many rows as lanes.
SLRC_INLINE inline void TransposeSquare(Lanes<kLanes>::Float (&rows)[kLanes]) {
  Stage<Floats, 1>(rows);  // of rows 4 R, 4 R + 1 (4 R + 2, 4 R + 3): columns 4 g, 4 g + 1 (4 g + 2, 4 g + 3) of each
  Stage<Pairs, 2>(rows);
  if constexpr (kLanes >= 8) Stage<Halves, 4>(rows);
  if constexpr (kLanes == 16) Stage<Fours, 8>(rows);
}
// Whole lines are read and written: one by one, those of rows a power of two apart would drive each other from the
// cache.
void Transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t floats, float* to, int64_t to_pitch) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_floats = floats / kLanes * kLanes;
  for (int64_t i = 0; i < whole_rows; i += kLanes)
    for (int64_t j = 0; j < whole_floats; j += kLanes) {
      Lanes<kLanes>::Float square[kLanes];
      Unroll<kLanes>([&](int r) SLRC_INLINE { square[r] = Load<kLanes>(from + (i + r) * from_pitch + j); });
      TransposeSquare(square);
      Unroll<kLanes>([&](int r) SLRC_INLINE { Store<kLanes>(to + (j + ColumnOf(r)) * to_pitch + i, square[r]); });
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_floats : 0; j < floats; ++j)
      to[j * to_pitch + i] = from[i * from_pitch + j];
}

// Keeps a NaN of either.
template <class V>
SLRC_INLINE inline V Greater(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

template <bool Odd>
struct Alternate {
  static constexpr int At(int l) { return 2 * l + Odd; }
};

// The windows of two rows from the j-th on, N at a time and then fewer.
template <int N>
SLRC_INLINE inline void PoolRows(const float* x, int64_t width, int64_t j, float* y) {
  constexpr auto kAll = std::make_integer_sequence<int, N>();
  for (; j + N <= width / 2; j += N) {
    const auto a = Greater(Load<N>(x + 2 * j), Load<N>(x + 2 * j + width));
    const auto b = Greater(Load<N>(x + 2 * j + N), Load<N>(x + 2 * j + N + width));
    Store<N>(y + j, Greater(Shuffle<Alternate<false>>(a, b, kAll), Shuffle<Alternate<true>>(a, b, kAll)));
  }
  if constexpr (N > 1) PoolRows<N / 2>(x, width, j, y);
}

void MaxPool2x2(const float* x, int64_t height, int64_t width, float* y) {
  for (int64_t o = 0; o < height / 2; ++o) PoolRows<kLanes>(x + 2 * o * width, width, 0, y + o * (width / 2));
}

// One and then the other of the first (or, `High`, the last) halves of two vectors.
template <int N, bool High>
struct Zip {
  static constexpr int At(int l) { return High * N / 2 + l / 2 + l % 2 * N; }
};

template <class V>
SLRC_INLINE inline V Nearer(V near, V far) {
  return near * 0.75f + far * 0.25f;
}

// A row between two of x, the first of them nearer, from its j-th pixel up to the last but one: two pixels for each.
template <int N>
SLRC_INLINE inline void UpsampleRow(const float* near, const float* far, int64_t width, int64_t j, float* y) {
  constexpr auto kAll = std::make_integer_sequence<int, N>();
  for (; j + N < width; j += N) {
    const auto here = Nearer(Load<N>(near + j), Load<N>(far + j));
    const auto left = Nearer(here, Nearer(Load<N>(near + j - 1), Load<N>(far + j - 1)));
    const auto right = Nearer(here, Nearer(Load<N>(near + j + 1), Load<N>(far + j + 1)));
    if constexpr (N == 1) {
      Store<1>(y + 2 * j, left);
      Store<1>(y + 2 * j + 1, right);
    } else {
      Store<N>(y + 2 * j, Shuffle<Zip<N, false>>(left, right, kAll));
      Store<N>(y + 2 * j + N, Shuffle<Zip<N, true>>(left, right, kAll));
    }
  }
  if constexpr (N > 1) UpsampleRow<N / 2>(near, far, width, j, y);
}

void UpsampleBilinear2x(const float* x, int64_t height, int64_t width, float* y) {
  for (int64_t o = 0; o < 2 * height; ++o, y += 2 * width) {
    const int64_t next = o / 2 + (o % 2 ? 1 : -1), last = width - 1;
    const float* near = x + o / 2 * width;
    const float* far = next < 0 || next == height ? near : x + next * width;
    const float first = Nearer(near[0], far[0]), end = Nearer(near[last], far[last]);
    y[0] = first;
    y[2 * last + 1] = end;
    if (width == 1) continue;
    y[1] = Nearer(first, Nearer(near[1], far[1]));
    y[2 * last] = Nearer(end, Nearer(near[last - 1], far[last - 1]));
    UpsampleRow<kLanes>(near, far, width, 1, y);
  }
}

}  // namespace
}  // namespace slrc
