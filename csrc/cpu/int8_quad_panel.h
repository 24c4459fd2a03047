// Panels of int8 weights (int8_panel.h) with AVX-512 VBMI, a quad at a time. Their order of inputs
// is another one: four vectors of a quad, vector k with input k of each of its four groups; x is
// turned likewise. kQuadOffset is added to every weight.
#pragma once

#include "int8_panel.h"
#include "int8_quads.h"
#include "int8_tokens.h"

namespace slab {
namespace {

constexpr int kQuadOffset = 128;  // on every weight, which has no sign then

// Brings the 16 inputs of a quad, [4 groups][4 inputs], into the order [4 inputs][4 groups].
inline void order_for_panels(int8_t* x) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int half = 0; half < 2; ++half) {
    uint8_t* const at = (uint8_t*)x + 64 * half;
    _mm512_storeu_si512(at, _mm512_shuffle_epi8(_mm512_loadu_si512(at), order));
  }
}
// x of `many`. Vector k of a quad has input k of each of its groups, in bytes.
inline void quantise_for_quad_panels(const CpuWeight& w, const Int8Tokens& t, const float* x,
                                     int64_t token) {
  quantise_many(w, t, x, token, kQuadOffset, [](Int8Piece& piece, int at) {
    piece.place = (at / 16 * 4 + at % 4) * 4 * kRows;
    piece.shift = 24 - 8 * (at / 4 % 4);
  });
  for (int64_t kb = 0; kb < w.k_blocks; ++kb)
    order_for_panels(t.x + (kb * t.count + token) * kInputs);
}

// Two tables by an index of six bits, which is a code with the number of its group above it. Bits 0
// to 3 of an entry say where V of the first (or the second) pruned input stands among the sixteen
// numbers of a quad. The bits above do not choose a number. In the table of the first pruned input
// they say where the kept and pruned entries of a group go:
// kFirstAtFront  Input 0 is the first kept one; without it, the first pruned one.
// kSecondAtBack  Input 3 is the second kept one; without it, the second pruned one.
// kCrossed       The second one that is left is input 1, and the first one that is left is input 2;
//                without it, the other way round.
enum : uint8_t { kCrossed = 0x20, kFirstAtFront = 0x40, kSecondAtBack = 0x80 };
constexpr Bytes pruned_places(int second) {
  constexpr int kPruned[8][2] = {{2, 3}, {1, 3}, {1, 2}, {0, 3}, {0, 2}, {0, 1}, {0, 0}, {0, 0}};
  constexpr int kGoes[8] = {kFirstAtFront | kCrossed,
                            kFirstAtFront,
                            kFirstAtFront | kSecondAtBack,
                            0,
                            kSecondAtBack,
                            kSecondAtBack | kCrossed,
                            0,
                            0};
  Bytes b{};
  for (int i = 0; i < 64; ++i) {
    const int input = kPruned[i & 7][second];
    b.at[i] = uint8_t(4 * (i >> 4) + input % 2 * 2 + input / 2 + (second ? 0 : kGoes[i & 7]));
  }
  return b;
}
constexpr Bytes kFirstPruned = pruned_places(0), kSecondPruned = pruned_places(1);

// u v of one pruned input of each group in a quad, times `level` where there are several planes:
// in units of 1/256, summed over ranks, then rounded to bytes, with the offset.
template <int kPlanes, class H>
SLAB_INLINE __m512i pruned_products(__m512i places, __m512i level, const H (*a)[4][1], int scale,
                                    const int16_t* v, int64_t stride, int64_t rank) {
  const __m512i odd_places = _mm512_srli_epi16(places, 8);
  __m512i even = _mm512_setzero_si512(), odd = even;
  for (int64_t r = 0; r < rank; ++r) {
    const __m512i u = (__m512i)a[r][scale][0];
    const __m512i quad =
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(v + r * stride)));
    const __m512i v_even = _mm512_permutexvar_epi16(places, quad);
    const __m512i v_odd = _mm512_permutexvar_epi16(odd_places, quad);
    even = _mm512_add_epi16(even, _mm512_mulhrs_epi16(u, v_even));
    odd = _mm512_add_epi16(odd, _mm512_mulhrs_epi16(u, v_odd));
  }
  if constexpr (kPlanes > 1) {
    even = _mm512_mullo_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(level, 8), 8));
    odd = _mm512_mullo_epi16(odd, _mm512_srai_epi16(level, 8));
  }
  // Half a unit, and 128 units for the offset; then the bytes above the fractions of both.
  const __m512i add = _mm512_set1_epi16(int16_t(kFraction / 2 + kQuadOffset * kFraction));
  const __m512i next =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15));
  return _mm512_mask_shuffle_epi8(_mm512_add_epi16(odd, add), 0x5555555555555555u,
                                  _mm512_add_epi16(even, add), next);
}

// kRank: 1, or 0 for any.
template <ValueType kValues, int kPlanes, Entries kEntries, int kRank, class H>
void build_quads(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                 const H (*a)[4][1], uint8_t* panel) {
  const __m512i zero = _mm512_setzero_si512(), none = _mm512_set1_epi8(char(kQuadOffset));
  const int64_t stride = w.k_blocks * kInputs, rank = kRank ? kRank : w.rank;
  const int16_t* const v_block = t.v + kb * kInputs;
  const int scale_words = w.group_size == 128 ? 2 : w.group_size == 64;  // log2 of a scale's words
  QuadRow<kValues, kPlanes> row;
  row.open(w.stream + (rb * w.k_blocks + kb) * w.block_size);
  for (int word = 0; word < 4; ++word) {
    row.load_word(word);
    const int scale = word >> scale_words;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int quad = 2 * word + half;
      const __m512i codes = row.codes_of(half, 0x30201000);  // and above them the group's number
      const __m512i first = _mm512_permutexvar_epi8(codes, load_bytes(kFirstPruned));
      __m512i kept[2] = {none, none}, pruned[2] = {none, none};
      if constexpr (kEntries == Entries::merged) row.kept_values(quad, char(kQuadOffset), kept);
      if constexpr (kPlanes > 0) {
        const __m512i second = _mm512_permutexvar_epi8(codes, load_bytes(kSecondPruned));
        const __mmask64 differs = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(8));
        const int16_t* const v = v_block + 16 * quad;
        __m512i level[2] = {zero, zero};
        if constexpr (kPlanes > 1) {
          row.levels_of(quad, level);
          level[0] = _mm512_mask_sub_epi8(level[0], differs, zero, level[0]);
        }
        pruned[0] = pruned_products<kPlanes>(first, level[0], a, scale, v, stride, rank);
        pruned[1] = pruned_products<kPlanes>(second, level[1], a, scale, v, stride, rank);
        if constexpr (kPlanes == 1) {  // 0 less the byte w + 128 is -w + 128.
          const __mmask64 negative = row.negative(quad);
          pruned[0] = _mm512_mask_sub_epi8(pruned[0], negative ^ differs, zero, pruned[0]);
          pruned[1] = _mm512_mask_sub_epi8(pruned[1], negative, zero, pruned[1]);
        }
      }
      const __mmask64 at_front = _mm512_test_epi8_mask(first, _mm512_set1_epi8(kFirstAtFront));
      const __mmask64 at_back = _mm512_movepi8_mask(first);  // kSecondAtBack
      const __mmask64 crossed = _mm512_test_epi8_mask(first, _mm512_set1_epi8(kCrossed));
      const __m512i front = _mm512_mask_blend_epi8(at_front, kept[0], pruned[0]);
      const __m512i back = _mm512_mask_blend_epi8(at_back, kept[1], pruned[1]);
      uint8_t* const to = panel + 256 * quad;
      _mm512_store_si512(to, _mm512_mask_blend_epi8(at_front, pruned[0], kept[0]));
      _mm512_store_si512(to + 64, _mm512_mask_blend_epi8(crossed, front, back));
      _mm512_store_si512(to + 128, _mm512_mask_blend_epi8(crossed, back, front));
      _mm512_store_si512(to + 192, _mm512_mask_blend_epi8(at_back, pruned[1], kept[1]));
    }
  }
}

}  // namespace
}  // namespace slab
