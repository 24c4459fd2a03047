// The weight of the product for many tokens with 16-bit integers (int16.h), on AVX2.
//
// Two neighbouring groups of a row share a word of a vector, 16 bits each, so a cell is input p of
// either group: inputs 8 j + p and 8 j + 4 + p. All positions of a group are computed as if they
// were pruned, then kept values take their places.
//
// A pruned entry is u times v, with integers for both: u in eighths of the row's step, v in parts
// of its largest magnitude in the block. A kept one is its value times the scale in parts of the
// step, 1/8 for int4 and 1/128 for int8 values.
#pragma once

#include "../int16.h"
#include "avx2.h"
#include "int8_shuffle.h"
#include "rebuild.h"

namespace slab {
namespace {

// 8 times the inverse of a step below 2^-125 would overflow fp32; this leaves some room.
constexpr float kLeastStep = 0x1p-120f;
constexpr int kCellsOfBlock = kInputs / 2;
// The sum over ranks of u v, in eighths of a step, fits in 16 bits with the largest level.
static_assert(7 * (8 * kMostOfWeight / 7 + kManyRank / 2) <= 32767);

// -1 in both bytes where a code puts its first or second, kept or pruned, input at `position`.
constexpr Lane where_at(const Lane& of_code, int position) {
  Lane t{};
  for (int c = 0; c < 16; ++c) t.at[c] = of_code.at[c] == position ? 255 : 0;
  return t;
}
constexpr Lane kFirstAt[3] = {where_at(kKeptFirst, 0), where_at(kKeptFirst, 1),
                              where_at(kKeptFirst, 2)};
constexpr Lane kSecondAt[4] = {Lane{}, where_at(kKeptSecond, 1), where_at(kKeptSecond, 2),
                               where_at(kKeptSecond, 3)};
// Where the first pruned input is input 1 or 2; where it is neither, it is input 0.
constexpr Lane kFirstPrunedAt[3] = {Lane{}, where_at(kPrunedFirst, 1), where_at(kPrunedFirst, 2)};
// Bytes 0 and 1, or 2 and 3, of a word, each above 8 bits of zeros.
constexpr Order kTopBytes[2] = {bytes_of_words(-1, 0, -1, 1), bytes_of_words(-1, 2, -1, 3)};

// The numbers that are the same for 16 rows in a block of inputs, by strips.
struct RowFactors {
  using F = Avx2::F;
  F steps[kStrips];
  __m256i kept[4][kStrips];            // by scales
  __m256i pruned[kManyRank][kStrips];  // by ranks

  static SLAB_INLINE F size(F x) { return _mm256_and_ps((F)_mm256_set1_epi32(0x7FFFFFFF), x); }
  // The nearest integer, in both halves of a word.
  static SLAB_INLINE __m256i twice(F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    return _mm256_blend_epi16(n, _mm256_slli_epi32(n, 16), 0xAA);
  }
  // The largest magnitudes of the int8 values of the 16 rows under scale s.
  static SLAB_INLINE void largest_values(const CpuWeight& w, const uint8_t* values, int s,
                                         F (&most)[kStrips]) {
    __m256i bytes = _mm256_setzero_si256();  // [16 first, 16 second]
    const int groups = w.group_size / kGroup;
    for (int g = s * groups; g < (s + 1) * groups; ++g)
      bytes = _mm256_max_epu8(bytes, _mm256_abs_epi8(load_strip(values + 32 * g)));
    const __m128i rows =
        _mm_max_epu8(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    most[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(rows));
    most[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(rows, 8)));
  }

  SLAB_INLINE RowFactors(const CpuWeight& w, const Int16Factors& v, int64_t rb, int64_t kb) {
    const bool bytes = w.values == kInt8;
    const int scales = kInputs / w.group_size;
    const float unit = level_unit(w.planes);
    const F zero = Avx2::zero(), part = _mm256_set1_ps(1.0f / float(kMostOfWeight));
    const uint8_t* const end = w.stream + (rb * w.k_blocks + kb + 1) * w.block_size;
    const uint8_t* const at = end - scale_bytes(w.values, w.group_size);
    const auto u = [&](int64_t r, int h) __attribute__((always_inline)) {
      return Avx2::load(w.u + (rb * w.rank + r) * kRows + h * Avx2::kLanes);
    };
    const auto most_v = [&](int64_t r) __attribute__((always_inline)) {
      return _mm256_set1_ps(v.most[r * w.k_blocks + kb]);
    };

    // What the kept values need.
    F scale[4][kStrips], there[4][kStrips];  // `there`: whether a value is not 0
    for (int h = 0; h < kStrips; ++h) steps[h] = _mm256_set1_ps(kLeastStep);
    for (int s = 0; s < scales; ++s) {
      F most[kStrips] = {_mm256_set1_ps(8.0f), _mm256_set1_ps(8.0f)};
      if (bytes) largest_values(w, at - value_bytes(kInt8), s, most);
      for (int h = 0; h < kStrips; ++h) {
        scale[s][h] = Avx2::load_values<kBf16>(at + 2 * (kRows * s + Avx2::kLanes * h));
        there[s][h] = _mm256_cmp_ps(most[h], zero, _CMP_NEQ_OQ);
        // 128 scales have to stay below 2^15 steps, or the factor would leave 16 bits.
        if (bytes) most[h] = _mm256_max_ps(most[h], _mm256_set1_ps(kMostOfWeight / 255.0f));
        const F largest = _mm256_and_ps(most[h], there[s][h]);
        steps[h] = _mm256_max_ps(steps[h], size(scale[s][h]) * (largest * part));
      }
    }
    // What the sign term needs.
    F bound[kStrips] = {zero, zero};
    for (int64_t r = 0; r < w.rank; ++r)
      for (int h = 0; h < kStrips; ++h) bound[h] = bound[h] + size(u(r, h)) * most_v(r);
    const F levels = _mm256_set1_ps(unit * float(most_level(w.planes))) * part;
    for (int h = 0; h < kStrips; ++h) steps[h] = _mm256_max_ps(steps[h], bound[h] * levels);
    // The factors of both.
    for (int h = 0; h < kStrips; ++h) {
      const F inverse = _mm256_set1_ps(1.0f) / steps[h];
      const F of_values = _mm256_set1_ps(bytes ? 128.0f : 8.0f);
      for (int s = 0; s < scales; ++s)
        kept[s][h] = twice(_mm256_and_ps(scale[s][h] * inverse * of_values, there[s][h]));
      const F eighths = inverse * _mm256_set1_ps(8.0f * unit);
      for (int64_t r = 0; r < w.rank; ++r) pruned[r][h] = twice(u(r, h) * most_v(r) * eighths);
    }
  }
};

// 8 rows of a block. Pair j of word i is groups 8 i + 2 j and the next one.
template <ValueType kValues, int kPlanes>
struct PairStrip : Strip<kValues, kPlanes> {
  using Base = Strip<kValues, kPlanes>;

  // A nibble for each group of the pair, in both of its bytes.
  static SLAB_INLINE __m256i nibbles_of(__m256i word, int j) {
    const __m256i four = shuffled(word, kFourTimes[j]);
    const __m256i apart = _mm256_blend_epi16(four, _mm256_srli_epi16(four, 4), 0xAA);
    return _mm256_and_si256(apart, _mm256_set1_epi8(0x0F));
  }
  // -1 where the second pruned input is negative, else 1.
  SLAB_INLINE __m256i second_signs(int i, int j) const {
    const __m256i eight = shuffled(load_strip(Base::signs), kFourTimes[3 - i]);
    const __m256i bits = _mm256_set1_epi32(0x40408080 >> 2 * j);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(eight, bits), bits);
    return _mm256_or_si256(set, _mm256_set1_epi16(1));
  }
  // The fields of the levels, as the tables of LevelLanes take them.
  SLAB_INLINE __m256i fields_of(int i, int j) const {
    if constexpr (kPlanes == 3) return nibbles_of(load_strip(Base::levels + 64 * i), j);
    __m256i four =
        shuffled(load_strip(Base::levels + 64 * (i / 2)), kFourTimes[2 * (i % 2) + j / 2]);
    if (j % 2) four = _mm256_srli_epi16(four, 4);
    return _mm256_and_si256(four, _mm256_set1_epi32(0x0C0C0303));
  }
  // The kept values of the pair at the top of their 16 bits.
  SLAB_INLINE void values_of(int i, int j, __m256i* first, __m256i* second) const {
    if constexpr (kValues == kInt4) {
      const __m256i top = _mm256_set1_epi16(int16_t(0xF000));
      const __m256i bytes =
          shuffled(load_strip(Base::values + 64 * (2 * i + j / 2)), kTopBytes[j % 2]);
      *first = _mm256_and_si256(_mm256_slli_epi16(bytes, 4), top);
      *second = _mm256_and_si256(bytes, top);
    } else {
      const uint8_t* const at = Base::values + 32 * (8 * i + 2 * j);
      *first = top_bytes(at, at + 32);
      *second = top_bytes(at + 16, at + 48);
    }
  }
  static SLAB_INLINE __m256i top_bytes(const uint8_t* low, const uint8_t* high) {
    const __m128i zero = _mm_setzero_si128();
    const __m128i a = _mm_unpacklo_epi8(zero, _mm_loadl_epi64((const __m128i*)low)),
                  b = _mm_unpacklo_epi8(zero, _mm_loadl_epi64((const __m128i*)high));
    return _mm256_setr_m128i(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
  }
  static SLAB_INLINE __m256i choose(const Lane& mask, __m256i code, __m256i yes, __m256i no) {
    return _mm256_blendv_epi8(no, yes, table(mask, code));
  }

  // What u v is multiplied by at each position: a sign, or a level with it.
  SLAB_INLINE void signs_of(int i, int j, __m256i code, __m256i (&out)[kGroup]) const {
    __m256i first, second = second_signs(i, j);
    const __m256i r = table(kSignOfCode, code);
    if constexpr (kPlanes == 1) {
      first = _mm256_sign_epi16(second, r);
    } else {
      const __m256i field = fields_of(i, j), low = _mm256_set1_epi16(0x00FF);
      first = _mm256_sign_epi16(_mm256_and_si256(table(LevelLanes<kPlanes>::first, field), low), r);
      second = _mm256_sign_epi16(_mm256_and_si256(table(LevelLanes<kPlanes>::second, field), low),
                                 second);
    }
    out[0] = first;
    out[1] = choose(kFirstPrunedAt[1], code, first, second);
    out[2] = choose(kFirstPrunedAt[2], code, first, second);
    out[3] = second;
  }

  // Writes the 64 cells of the strip. v: of the block, the ranks `stride` numbers apart.
  template <int kRank>
  SLAB_INLINE void build(const RowFactors& f, const CpuWeight& w, int strip, const int16_t* v,
                         int64_t stride, float* panel) const {
    const __m256i eighth = _mm256_set1_epi16(1 << 12);  // for mulhrs, which divides by 2^15
    const int64_t rank = kRank == 1 ? 1 : w.rank;
    for (int i = 0; i < 4; ++i) {
      const __m256i codes = load_strip(Base::codes + 64 * i);
      const __m256i scale = f.kept[32 * i / w.group_size][strip];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i code = nibbles_of(codes, j);
        const int16_t* const own = v + 8 * (4 * i + j);
        __m256i out[kGroup], first, second;
        for (int p = 0; p < kGroup; ++p) out[p] = _mm256_setzero_si256();
        if constexpr (kRank > 0) {
          for (int64_t r = 0; r < rank; ++r)
            for (int p = 0; p < kGroup; ++p) {
              int32_t both;
              std::memcpy(&both, own + r * stride + 2 * p, 4);
              const __m256i uv = _mm256_mulhrs_epi16(f.pruned[r][strip], _mm256_set1_epi32(both));
              out[p] = kRank == 1 ? uv : _mm256_add_epi16(out[p], uv);
            }
          __m256i signs[kGroup];
          signs_of(i, j, code, signs);
          for (int p = 0; p < kGroup; ++p) {
            out[p] = kPlanes == 1 ? _mm256_sign_epi16(out[p], signs[p])
                                  : _mm256_mullo_epi16(out[p], signs[p]);
            out[p] = _mm256_mulhrs_epi16(out[p], eighth);
          }
        }
        values_of(i, j, &first, &second);
        first = _mm256_mulhrs_epi16(first, scale);
        second = _mm256_mulhrs_epi16(second, scale);
        for (int p = 0; p < 3; ++p) out[p] = choose(kFirstAt[p], code, first, out[p]);
        float* const to = panel + kGroup * (4 * i + j) * kTileRows;
        for (int p = 0; p < kGroup; ++p) {
          if (p) out[p] = choose(kSecondAt[p], code, second, out[p]);
          _mm256_storeu_si256((__m256i*)(to + p * kTileRows), out[p]);
        }
      }
    }
  }
};

// A panel of cells, behind which the steps of its rows stand.
struct Int16Panel {
  static constexpr int kCellInputs = 2, kPanelBlocks = 1, kPanelCells = kCellsOfBlock + 1;
  const Int16Factors& v;

  template <ValueType kValues, int kPlanes>
  void build(const CpuWeight& w, int64_t rb, int64_t kb, float* panel) const {
    const RowFactors f(w, v, rb, kb);
    const int64_t stride = w.k_blocks * kInputs;
    for (int h = 0; h < kStrips; ++h) {
      Avx2::store(panel + kCellsOfBlock * kTileRows + h * kStripRows, f.steps[h]);
      PairStrip<kValues, kPlanes> strip;
      strip.open(w.stream + (rb * w.k_blocks + kb) * w.block_size, h);
      const auto with = [&](auto rank) {
        strip.template build<rank.value>(f, w, h, v.v + kb * kInputs, stride,
                                         panel + h * kStripRows);
      };
      if constexpr (kPlanes == 0)
        with(Constant<0>{});
      else
        w.rank == 1 ? with(Constant<1>{}) : with(Constant<2>{});  // 2 stands for any other rank
    }
  }
  void rebuild(const CpuWeight& w, int64_t first, int64_t second, int64_t kb, float* panel) const {
    for_integers(w, [&](auto values, auto planes) {
      build<ValueType(values.value), planes.value>(w, first, kb, panel);
      build<ValueType(values.value), planes.value>(w, second, kb, panel + kRows);
    });
  }
};

}  // namespace
}  // namespace slab
