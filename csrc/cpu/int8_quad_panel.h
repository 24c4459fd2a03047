// Panels of int8 weights (int8_panel.h) with AVX-512 VBMI, a quad at a time. Their order of inputs
// is another one: four vectors of a quad, vector k with input k of each of its four groups. x and V
// are turned likewise.
#pragma once

#include "int8_panel.h"
#include "int8_quads.h"
#include "int8_tokens.h"

namespace slab {
namespace {

// Brings the 16 inputs of a quad, [4 groups][4 inputs], into the order [4 inputs][4 groups], with
// 128 on each.
inline void order_for_panels(int8_t* x) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i flip = _mm512_set1_epi8(-128);
  for (int half = 0; half < 2; ++half) {
    const __m512i turned = _mm512_shuffle_epi8(_mm512_loadu_si512(x + 64 * half), order);
    _mm512_storeu_si512(x + 64 * half, _mm512_xor_si512(turned, flip));
  }
}
// x of `many`. Vector k of a quad has input k of each of its groups, in bytes.
inline void quantise_for_quad_panels(const CpuWeight& w, const Int8Tokens& t, const float* x,
                                     int64_t token) {
  quantise_many(w, t, x, token, [](Int8Piece& piece, int at) {
    piece.place = (at / 16 * 4 + at % 4) * 4 * kRows;
    piece.shift = 24 - 8 * (at / 4 % 4);
  });
  for (int64_t kb = 0; kb < w.k_blocks; ++kb)
    order_for_panels(t.x + (kb * t.count + token) * kInputs);
}
// V of a quad in the order [4 inputs][groups 0 2 1 3]: the groups of even bytes and of odd ones.
void quantise_v_for_quads(const CpuWeight& w, const Int8Tokens& t) {
  quantise_v(w, t);
  for (int64_t at = 0; at < w.rank * w.k_blocks * kInputs; at += 16) {
    int16_t quad[16];
    std::memcpy(quad, t.v + at, 32);
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < 4; ++j) {
        const int from = k % 2 * 2 + k / 2,
                  group = j % 2 * 2 + j / 2;  // of 0 1 2 3: 0 2 1 3
        t.v[at + 4 * k + j] = quad[4 * group + from];
      }
  }
}

// What a code says of each of the four inputs, a bit each.
enum : int {
  kFirst0 = 1,
  kFirst1 = 2,
  kFirst2 = 4,
  kSecond1 = 8,
  kSecond2 = 16,
  kSecond3 = 32,
  kPruned1 = 64,
  kPruned2 = 128
};  // the latter two: it is the first pruned one
constexpr Bytes roles() {
  const int role[8] = {kFirst0 | kSecond1 | kPruned2,
                       kFirst0 | kSecond2 | kPruned1,
                       kFirst0 | kSecond3 | kPruned1,
                       kFirst1 | kSecond2,
                       kFirst1 | kSecond3,
                       kFirst2 | kSecond3,
                       0,
                       0};
  Bytes b{};
  for (int i = 0; i < 64; ++i) b.at[i] = uint8_t(role[i & 7]);
  return b;
}
constexpr Bytes kRoles = roles();

// Two 16-bit numbers in every lane, brought there by the load itself.
SLAB_INLINE __m512i two_words(const int16_t* v) {
  int32_t pair;
  std::memcpy(&pair, v, 4);
  return _mm512_set1_epi32(pair);
}

// kRank: 1, or 0 for any.
template <ValueType kValues, int kPlanes, Entries kEntries, int kRank, class H>
void build_quads(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                 const H (*a)[4][1], uint8_t* panel) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i half_up = _mm512_set1_epi16(kFraction / 2);
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
      const __m512i codes = row.codes_of(half, 0);
      const __m512i role = _mm512_shuffle_epi8(load_bytes(kRoles), codes);
      const auto is = [&](int bit) __attribute__((always_inline)) {
        return _mm512_test_epi8_mask(role, _mm512_set1_epi8(char(bit)));
      };
      __m512i kept[2] = {zero, zero}, level[2];
      if constexpr (kEntries == Entries::merged) row.kept_values(quad, kept);
      __mmask64 second = 0, differs = 0;
      if constexpr (kPlanes == 1) second = row.negative(quad);
      if constexpr (kPlanes > 0) differs = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(8));
      if constexpr (kPlanes > 1) {
        row.levels_of(quad, level);
        level[0] = _mm512_mask_sub_epi8(level[0], differs, zero, level[0]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __mmask64 is_first = k == 0   ? ~__mmask64(0)
                                   : k == 3 ? 0
                                            : is(k == 1 ? kPruned1 : kPruned2);
        __m512i out = zero;
        if constexpr (kPlanes > 0) {
          const int16_t* const v = v_block + 16 * quad + 4 * k;
          __m512i even = zero, odd = zero;
          for (int64_t r = 0; r < rank; ++r) {
            const __m512i u = (__m512i)a[r][scale][0];
            even = _mm512_add_epi16(even, _mm512_mulhrs_epi16(u, two_words(v + r * stride)));
            odd = _mm512_add_epi16(odd, _mm512_mulhrs_epi16(u, two_words(v + r * stride + 2)));
          }
          if constexpr (kPlanes > 1) {
            const __m512i by = _mm512_mask_blend_epi8(is_first, level[1], level[0]);
            even = _mm512_mullo_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(by, 8), 8));
            odd = _mm512_mullo_epi16(odd, _mm512_srai_epi16(by, 8));
          }
          const __m512i low = _mm512_mulhrs_epi16(even, half_up);  // (even + 128) >> 8
          const __m512i high = _mm512_add_epi16(odd, half_up);
          out = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0xFF), low, high, 0xCA);
          if constexpr (kPlanes == 1) {
            const __mmask64 negative = second ^ (differs & is_first);
            out = _mm512_mask_sub_epi8(out, negative, zero, out);
          }
        }
        if (kEntries == Entries::merged || kPlanes > 0) {
          if (k < 3)
            out = _mm512_mask_mov_epi8(out,
                                       is(k == 0   ? kFirst0
                                          : k == 1 ? kFirst1
                                                   : kFirst2),
                                       kept[0]);
          if (k > 0)
            out = _mm512_mask_mov_epi8(out,
                                       is(k == 1   ? kSecond1
                                          : k == 2 ? kSecond2
                                                   : kSecond3),
                                       kept[1]);
        }
        _mm512_store_si512(panel + 64 * (4 * quad + k), out);
      }
    }
  }
}

}  // namespace
}  // namespace slab
