// Quads of the stream, with AVX-512 VBMI and BITALG: a quad is four groups, 16 inputs. Byte j of
// lane n belongs to group j of row n.
#pragma once

#include <immintrin.h>

#include "../int8.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kQuads = kGroups / 4;  // of a block

struct Bytes {
  alignas(64) uint8_t at[64];
};
// Byte j of lane n is first + 32 (n % 2) + step j: a bit of the 64-bit word that two lanes make.
constexpr Bytes bit_places(int first, int step) {
  Bytes b{};
  for (int n = 0; n < kRows; ++n)
    for (int j = 0; j < 4; ++j) b.at[4 * n + j] = uint8_t(32 * (n % 2) + first + step * j);
  return b;
}
struct BitPlaces {
  Bytes quad[kQuads];
  constexpr BitPlaces(int first, int quad_step, int step) : quad() {
    for (int q = 0; q < kQuads; ++q) quad[q] = bit_places(first + quad_step * q, step);
  }
};
constexpr BitPlaces kSignBits(31, -4, -1);
constexpr Bytes kCodeBits[2] = {bit_places(0, 4), bit_places(16, 4)};
constexpr Bytes kLevelBits[4] = {bit_places(0, 2), bit_places(8, 2), bit_places(16, 2),
                                 bit_places(24, 2)};

// Byte j of lane n of the first or second int8 values of a quad, which lie [group][16 first, 16
// second].
constexpr Bytes value_order(int second) {
  Bytes b{};
  for (int n = 0; n < kRows; ++n)
    for (int j = 0; j < 4; ++j) b.at[4 * n + j] = uint8_t(32 * j + 16 * second + n);
  return b;
}
constexpr Bytes kFirstValues = value_order(0), kSecondValues = value_order(1);

// The levels as integers by the field of a group, the first position's bits below.
constexpr Bytes level_table(int planes, int second) {
  Bytes b{};
  const int bits = planes - 1;
  for (int i = 0; i < 64; ++i)
    b.at[i] =
        uint8_t(most_level(planes) - 2 * ((i % 16 >> (second ? bits : 0)) & ((1 << bits) - 1)));
  return b;
}

SLAB_INLINE __m512i load_bytes(const Bytes& b) { return _mm512_load_si512(b.at); }

// One row block in one block of inputs.
template <ValueType kValues, int kPlanes>
struct QuadRow {
  const uint8_t *levels, *codes, *values, *scales;
  __m512i signs, code, level;

  SLAB_INLINE void open(const uint8_t* block) {
    if constexpr (kPlanes > 0) signs = _mm512_loadu_si512(block);
    levels = block + sign_bytes(kPlanes);
    codes = levels + level_bytes(kPlanes);
    values = codes + code_bytes();
    scales = values + value_bytes(kValues);
  }
  SLAB_INLINE void load_word(int word) {
    code = _mm512_loadu_si512(codes + 64 * word);
    if constexpr (kPlanes == 3) level = _mm512_loadu_si512(levels + 64 * word);
    if constexpr (kPlanes == 2) level = _mm512_loadu_si512(levels + 64 * (word / 2));
  }
  // Byte j: the code of group j of the quad, plus byte j of `above`.
  SLAB_INLINE __m512i codes_of(int half, uint32_t above) const {
    const __m512i bits = _mm512_multishift_epi64_epi8(load_bytes(kCodeBits[half]), code);
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(0x0F), _mm512_set1_epi32(int(above)),
                                     0xEA);  // a & b | c
  }
  SLAB_INLINE __mmask64 negative(int quad) const {  // the sign of the second pruned position
    return _mm512_bitshuffle_epi64_mask(signs, load_bytes(kSignBits.quad[quad]));
  }
  // Byte 3 - word: twice the number of a word's eight groups with a positive sign.
  SLAB_INLINE __m512i positive_twos() const {
    const __m512i positive = _mm512_xor_si512(signs, _mm512_set1_epi32(-1));
    return _mm512_slli_epi32(_mm512_popcnt_epi8(positive), 1);
  }
  // The first and second kept values, every byte xor `flip`.
  SLAB_INLINE void kept_values(int quad, char flip, __m512i* out) const {
    const __m512i flips = _mm512_set1_epi8(flip);
    if constexpr (kValues == kInt4) {  // times 16
      const __m512i word = _mm512_loadu_si512(values + 64 * quad), high = _mm512_set1_epi8(-16);
      // a & b ^ c
      out[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi32(word, 4), high, flips, 0x6A);
      out[1] = _mm512_ternarylogic_epi32(word, high, flips, 0x6A);
    } else {
      const __m512i low = _mm512_loadu_si512(values + 128 * quad),
                    high = _mm512_loadu_si512(values + 128 * quad + 64);
      const __m512i first = _mm512_permutex2var_epi8(low, load_bytes(kFirstValues), high);
      const __m512i second = _mm512_permutex2var_epi8(low, load_bytes(kSecondValues), high);
      out[0] = _mm512_xor_si512(first, flips);
      out[1] = _mm512_xor_si512(second, flips);
    }
  }
  // What the first and the second pruned position of a group are multiplied by, less the sign that
  // the code holds of the first one.
  SLAB_INLINE void levels_of(int quad, __m512i* out) const {
    if constexpr (kPlanes == 1) {
      out[0] = out[1] =
          _mm512_mask_blend_epi8(negative(quad), _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
    } else {
      static constexpr Bytes first = level_table(kPlanes, 0), second = level_table(kPlanes, 1);
      const Bytes& places = kPlanes == 2 ? kLevelBits[quad % 4] : kCodeBits[quad % 2];
      const __m512i field =
          _mm512_and_si512(_mm512_multishift_epi64_epi8(load_bytes(places), level),
                           _mm512_set1_epi8(kPlanes == 2 ? 0x03 : 0x0F));
      out[0] = _mm512_shuffle_epi8(load_bytes(first), field);
      const __m512i size = _mm512_shuffle_epi8(load_bytes(second), field);
      out[1] = _mm512_mask_sub_epi8(size, negative(quad), _mm512_setzero_si512(), size);
    }
  }
};

}  // namespace
}  // namespace slab
