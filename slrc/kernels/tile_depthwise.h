// The sums of depthwise int8 layers (see DepthwiseRows in tile.h). For tile.cpp alone.
#pragma once

#include "layer_limits.h"
#include "tile_arithmetic.h"

namespace slrc {
namespace {

// Of each stride, which bytes become words in each four lanes, from the first one's on; and of vectors of four times
// that, from which four bytes on those of each four lanes are.
struct AlongTables {
  alignas(64) uint8_t bytes[kMostAlong][64] = {};
  alignas(64) uint32_t parts[kMostAlong][16] = {};

  constexpr AlongTables() {
    for (int64_t stride = 1; stride <= kMostAlong; ++stride) {
      for (int i = 0; i < 64; ++i) bytes[stride - 1][i] = static_cast<uint8_t>(i / 4 % 4 * stride + i % 4);
      for (int i = 0; i < 16; ++i) parts[stride - 1][i] = static_cast<uint32_t>(i / 4 * stride + i % 4);
    }
  }
};
constexpr AlongTables kAlong;

// Words of neighbours: word i is the four bytes of x from i * stride on, flipped (see TileLoops). What is read ends
// before byte 64.
class Along {
 public:
  explicit Along(int64_t stride) : stride_(stride) {
#if defined(__AVX512BW__)
    parts_ = _mm512_load_si512(kAlong.parts[stride - 1]);
    bytes_ = _mm512_load_si512(kAlong.bytes[stride - 1]);
#elif defined(__AVX2__)
    bytes_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(kAlong.bytes[stride - 1]));
#elif defined(SLRC_TILE_NEON)
    bytes_ = vld1q_u8(kAlong.bytes[stride - 1]);
#endif
  }

  SLRC_INLINE inline Lanes<kLanes>::Float operator()(const uint8_t* x) const {
    using V = Lanes<kLanes>::Float;
#if defined(__AVX512BW__)
    return (V)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(parts_, _mm512_loadu_si512(x)), bytes_);
#elif defined(__AVX2__)
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 4 * stride_));
    return (V)_mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), bytes_);
#elif defined(SLRC_TILE_NEON)
    return (V)veorq_u8(vqtbl1q_u8(vld1q_u8(x), bytes_), vdupq_n_u8(kFlip));
#else
    static_assert(kFlip == 0);
    V words;
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(reinterpret_cast<char*>(&words) + 4 * i, x + i * stride_, 4);
    return words;
#endif
  }

 private:
  int64_t stride_;
#if defined(__AVX512BW__)
  __m512i parts_, bytes_;
#elif defined(__AVX2__)
  __m256i bytes_;
#elif defined(SLRC_TILE_NEON)
  uint8x16_t bytes_;
#endif
};

// Sums of one vector and `Rows` rows. `Words` of the window, or of each of its rows where those are alike (`Parts`), are
// known to the compiler unless 0; rows that follow each other then share what they read.
template <int Words, int Parts, int Rows>
SLRC_INLINE inline void SumVector(const DepthwiseRows& job, const Along& along, const uint8_t* x, Word* sums) {
  Lanes<kLanes>::Float sum[Rows];
  Unroll<Rows>([&](int r) SLRC_INLINE { sum[r] = Repeat<kLanes>(job.bias); });
  const int64_t words = Words ? Words : job.words;
  for (int64_t w = 0; w < words; ++w)
    Unroll<Rows + Parts - 1>([&](int row) SLRC_INLINE {
      const auto column = along(x + row * job.row_step + job.offsets[w]);
      Unroll<kPasses>([&](int pass) SLRC_INLINE {
        const auto bytes = BytesOf<kLanes>(column, pass);
        Unroll<Parts>([&](int part) SLRC_INLINE {
          const int r = row - part;
          if (r < 0 || r >= Rows) return;
          const Word value = job.values[(part * words + w) * kPasses + pass];
          sum[r] = MultiplyAdd<kLanes>(sum[r], bytes, Repeat<kLanes>(value));
        });
      });
    });
  Unroll<Rows>([&](int r) SLRC_INLINE { Store<kLanes>(sums + r * job.width, sum[r]); });
}

// From right to left: a row's last vector stands out over the beginning of the next row, which comes later.
template <int Words, int Parts, int Rows>
SLRC_INLINE inline int64_t SumRows(const DepthwiseRows& job, const Along& along, int64_t row) {
  for (; row + Rows <= job.rows; row += Rows) {
    const uint8_t* const x = job.x + row * job.row_step;
    Word* const sums = job.sums + row * job.width;
    for (int64_t i = (job.width - 1) / kLanes * kLanes; i >= 0; i -= kLanes)
      SumVector<Words, Parts, Rows>(job, along, x + i * job.stride, sums + i);
  }
  return row;
}

void Depthwise(const DepthwiseRows& given) {
  const DepthwiseRows job = given;  // a copy that no store can reach
  const Along along(job.stride);
  if (job.words == 3 && job.offsets[1] == job.row_step && job.offsets[2] == 2 * job.row_step) {
    int64_t row = SumRows<1, 3, 4>(job, along, 0);
    row = SumRows<1, 3, 2>(job, along, row);
    SumRows<1, 3, 1>(job, along, row);
  } else if (job.words == 3) {
    SumRows<3, 1, 1>(job, along, 0);
  } else {
    SumRows<0, 1, 1>(job, along, 0);
  }
}

}  // namespace
}  // namespace slrc
