// Few tokens with int8 activations, on AVX-512 with VBMI: no weight is rebuilt. A quad is four
// groups, 16 inputs. For each of them a table of 16 bytes is indexed by the code of a row, so that
// one byte permutation of 64 answers four groups of 16 rows, and one vpdpbusd multiplies all of
// them. Tables of 128 bytes belong to a quad: first the entries of the first position of a code,
// then those of the second, in x plus 128. For x these are the kept positions, for x v_r the pruned
// ones, the first of them negated where the code says so.
//
// The 128 of the tables is taken off again by the sum of the multipliers, which all tokens share.
#pragma once

#include <immintrin.h>

#include "int8_tokens.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kTableBytes = 1024;  // of a term of a token in a block
constexpr int kQuads = kGroups / 4;

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

// Where the bytes of a quad's table come from: byte 16 j + c is of group j and code c.
constexpr Bytes table_order(int p0, int p1, int p2, int p3, int p4, int p5) {
  const int place[8] = {p0, p1, p2, p3, p4, p5, 0, 0};
  Bytes b{};
  for (int j = 0; j < 4; ++j)
    for (int c = 0; c < 16; ++c) b.at[16 * j + c] = uint8_t(4 * j + place[c & 7]);
  return b;
}
constexpr Bytes kKeptFirst = table_order(0, 0, 0, 1, 1, 2);
constexpr Bytes kKeptSecond = table_order(1, 2, 3, 2, 3, 3);
constexpr Bytes kPrunedFirst = table_order(2, 1, 1, 0, 0, 0);
constexpr Bytes kPrunedSecond = table_order(3, 3, 2, 3, 2, 1);

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
    b.at[i] = uint8_t(most_level(planes) -
                      2 * ((i % 16 >> (second ? bits : 0)) & ((1 << bits) - 1)));
  return b;
}

SLAB_INLINE __m512i load_bytes(const Bytes& b) { return _mm512_load_si512(b.at); }

inline void write_tables(const int8_t* x, bool pruned, uint8_t* out) {
  const __m512i first = load_bytes(pruned ? kPrunedFirst : kKeptFirst),
                second = load_bytes(pruned ? kPrunedSecond : kKeptSecond);
  const __mmask64 negated = pruned ? 0xFF00FF00FF00FF00ull : 0;
  const __m512i flip = _mm512_set1_epi8(-128);
  for (int q = 0; q < kQuads; ++q) {
    const __m512i quad = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + 16 * q)));
    const __m512i one = _mm512_shuffle_epi8(quad, first);
    const __m512i two = _mm512_shuffle_epi8(quad, second);
    const __m512i some = _mm512_mask_sub_epi8(one, negated, _mm512_setzero_si512(), one);
    _mm512_storeu_si512(out + 128 * q, _mm512_xor_si512(some, flip));
    _mm512_storeu_si512(out + 128 * q + 64, _mm512_xor_si512(two, flip));
  }
}

void quantise_with_tables(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                          int64_t token) {
  quantise(w, t, x, term, token);
  if (t.tables)
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const int64_t at = (term * w.k_blocks + kb) * t.count + token;
      write_tables(t.x + at * kInputs, term > 0, t.tables + at * kTableBytes);
    }
}

// kBlocks row blocks and kTokens tokens. kKept: kept values too, not only the sign term of a rank.
template <ValueType kValues, int kPlanes, bool kKept, int kTokens, int kBlocks>
struct TableBlocks {
  struct Multipliers {
    __m512i kept[2], pruned[2];  // for the first and the second position
  };
  struct Row {  // of one row block, in one block of inputs
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
    // Byte j: the code of group j of the quad, plus 16 j.
    SLAB_INLINE __m512i index(int half) const {
      const __m512i bits = _mm512_multishift_epi64_epi8(load_bytes(kCodeBits[half]), code);
      return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(0x0F), _mm512_set1_epi32(0x30201000),
                                       0xEA);  // a & b | c
    }
    SLAB_INLINE void kept_values(int quad, __m512i* out) const {
      if constexpr (kValues == kInt4) {  // times 16
        const __m512i word = _mm512_loadu_si512(values + 64 * quad), high = _mm512_set1_epi8(-16);
        out[0] = _mm512_and_si512(_mm512_slli_epi32(word, 4), high);
        out[1] = _mm512_and_si512(word, high);
      } else {
        const __m512i low = _mm512_loadu_si512(values + 128 * quad),
                      high = _mm512_loadu_si512(values + 128 * quad + 64);
        out[0] = _mm512_permutex2var_epi8(low, load_bytes(kFirstValues), high);
        out[1] = _mm512_permutex2var_epi8(low, load_bytes(kSecondValues), high);
      }
    }
    SLAB_INLINE void levels_of(int quad, __m512i* out) const {
      const __mmask64 negative =
          _mm512_bitshuffle_epi64_mask(signs, load_bytes(kSignBits.quad[quad]));
      if constexpr (kPlanes == 1) {
        out[0] = out[1] =
            _mm512_mask_blend_epi8(negative, _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
      } else {
        static constexpr Bytes first = level_table(kPlanes, 0), second = level_table(kPlanes, 1);
        const Bytes& places = kPlanes == 2 ? kLevelBits[quad % 4] : kCodeBits[quad % 2];
        const __m512i field =
            _mm512_and_si512(_mm512_multishift_epi64_epi8(load_bytes(places), level),
                             _mm512_set1_epi8(kPlanes == 2 ? 0x03 : 0x0F));
        out[0] = _mm512_shuffle_epi8(load_bytes(first), field);
        const __m512i size = _mm512_shuffle_epi8(load_bytes(second), field);
        out[1] = _mm512_mask_sub_epi8(size, negative, _mm512_setzero_si512(), size);
      }
    }
  };

  static SLAB_INLINE __m512 bf16(const uint8_t* at) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static SLAB_INLINE __m512 add(__m512 y, __m512i sum, __m512i excess, __m512 scale, float step) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, excess)),
                           _mm512_mul_ps(scale, _mm512_set1_ps(step)), y);
  }

  // sums[i][16 b + row] += the products of tokens [token, token + kTokens).
  static void multiply(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t token,
                       int64_t rank, float* sums) {
    const __m512i excess = _mm512_set1_epi8(-128);  // 128, as a byte without a sign
    __m512 y[kTokens][kBlocks];
    for (int i = 0; i < kTokens; ++i)
      for (int b = 0; b < kBlocks; ++b)
        y[i][b] = _mm512_loadu_ps(sums + (i * kBlocks + b) * kRows);
    const int scale_words = w.group_size / 32;
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const int64_t at = kb * t.count + token, other = ((1 + rank) * w.k_blocks) * t.count + at;
      const uint8_t* const x_tables = t.tables + at * kTableBytes;
      const uint8_t* const v_tables = t.tables + other * kTableBytes;
      Row row[kBlocks];
      __m512i kept[kTokens][kBlocks], pruned[kTokens][kBlocks];
      __m512i kept_excess[kBlocks], pruned_excess[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        row[b].open(w.stream + ((rb + b) * w.k_blocks + kb) * w.block_size);
        kept_excess[b] = pruned_excess[b] = _mm512_setzero_si512();
        for (int i = 0; i < kTokens; ++i) kept[i][b] = pruned[i][b] = _mm512_setzero_si512();
      }
      for (int word = 0; word < 4; ++word) {
        for (int b = 0; b < kBlocks; ++b) row[b].load_word(word);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int quad = 2 * word + half;
          __m512i index[kBlocks];
          Multipliers by[kBlocks];
          for (int b = 0; b < kBlocks; ++b) {
            index[b] = row[b].index(half);
            if constexpr (kKept) {
              row[b].kept_values(quad, by[b].kept);
              for (int p = 0; p < 2; ++p)
                kept_excess[b] = _mm512_dpbusd_epi32(kept_excess[b], excess, by[b].kept[p]);
            }
            if constexpr (kPlanes > 0) row[b].levels_of(quad, by[b].pruned);
            if constexpr (kPlanes > 1)
              for (int p = 0; p < 2; ++p)
                pruned_excess[b] = _mm512_dpbusd_epi32(pruned_excess[b], excess, by[b].pruned[p]);
          }
#pragma GCC unroll 8
          for (int i = 0; i < kTokens; ++i)
            for (int p = 0; p < 2; ++p) {
              const int64_t table = i * kTableBytes + 128 * quad + 64 * p;
              if constexpr (kKept) {
                const __m512i x = _mm512_loadu_si512(x_tables + table);
                for (int b = 0; b < kBlocks; ++b)
                  kept[i][b] = _mm512_dpbusd_epi32(
                      kept[i][b], _mm512_permutexvar_epi8(index[b], x), by[b].kept[p]);
              }
              if constexpr (kPlanes > 0) {
                const __m512i xv = _mm512_loadu_si512(v_tables + table);
                for (int b = 0; b < kBlocks; ++b)
                  pruned[i][b] = _mm512_dpbusd_epi32(
                      pruned[i][b], _mm512_permutexvar_epi8(index[b], xv), by[b].pruned[p]);
              }
            }
        }
        if constexpr (kKept)
          if ((word + 1) % scale_words == 0)
            for (int b = 0; b < kBlocks; ++b) {
              const __m512 unit = _mm512_set1_ps(kValues == kInt4 ? 0.0625f : 1.0f);
              const uint8_t* const scales = row[b].scales + 2 * kRows * (word / scale_words);
              const __m512 scale = _mm512_mul_ps(bf16(scales), unit);
              for (int i = 0; i < kTokens; ++i) {
                y[i][b] = add(y[i][b], kept[i][b], kept_excess[b], scale, t.step[at + i]);
                kept[i][b] = _mm512_setzero_si512();
              }
              kept_excess[b] = _mm512_setzero_si512();
            }
      }
      if constexpr (kPlanes > 0)
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (kPlanes == 1) {  // 256 for a sum of two, less 512 where it is negative
            const __m512i negative = _mm512_popcnt_epi32(row[b].signs);
            pruned_excess[b] = _mm512_sub_epi32(_mm512_set1_epi32(256 * kGroups),
                                                _mm512_slli_epi32(negative, 9));
          }
          const float* const u = w.u + ((rb + b) * w.rank + rank) * kRows;
          const __m512 scale =
              _mm512_mul_ps(_mm512_loadu_ps(u), _mm512_set1_ps(level_unit(kPlanes)));
          for (int i = 0; i < kTokens; ++i)
            y[i][b] = add(y[i][b], pruned[i][b], pruned_excess[b], scale, t.step[other + i]);
        }
    }
    for (int i = 0; i < kTokens; ++i)
      for (int b = 0; b < kBlocks; ++b)
        _mm512_storeu_ps(sums + (i * kBlocks + b) * kRows, y[i][b]);
  }
};

template <ValueType kValues, int kPlanes>
struct Tables {
  // sums[token][16 b + row] of all ranks, for kTokens tokens and kBlocks row blocks.
  template <int kTokens, int kBlocks>
  static void multiply(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t token,
                       float* sums) {
    std::memset(sums, 0, kTokens * kBlocks * kRows * 4);
    TableBlocks<kValues, kPlanes, true, kTokens, kBlocks>::multiply(w, t, rb, token, 0, sums);
    if constexpr (kPlanes > 0)
      for (int64_t r = 1; r < w.rank; ++r)
        TableBlocks<kValues, kPlanes, false, kTokens, kBlocks>::multiply(w, t, rb, token, r, sums);
  }
  template <int kTokens, int kBlocks>
  static void rows(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t rb,
                   int64_t token) {
    alignas(64) float sums[kTokens * kBlocks * kRows];
    multiply<kTokens, kBlocks>(w, t, rb, token, sums);
    for (int b = 0; b < kBlocks; ++b)
      end.finish(w, *end.tokens, rb + b, token, kTokens, sums + b * kRows, kBlocks * kRows);
  }
  static void few(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                  int64_t last) {
    int64_t rb = first;
    if (t.count == 1)
      for (; rb + 4 <= last; rb += 4) rows<1, 4>(w, t, end, rb, 0);
    for (; rb < last;) {
      const int blocks = rb + 2 <= last ? 2 : 1;
      int64_t token = 0;
      for (; token + 4 <= t.count; token += 4)
        blocks == 2 ? rows<4, 2>(w, t, end, rb, token) : rows<4, 1>(w, t, end, rb, token);
      for (; token + 2 <= t.count; token += 2)
        blocks == 2 ? rows<2, 2>(w, t, end, rb, token) : rows<2, 1>(w, t, end, rb, token);
      if (token < t.count)
        blocks == 2 ? rows<1, 2>(w, t, end, rb, token) : rows<1, 1>(w, t, end, rb, token);
      rb += blocks;
    }
  }
};

template <ValueType kValues>
void table_planes(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                  int64_t last) {
  switch (w.planes) {
    case 0: return Tables<kValues, 0>::few(w, t, end, first, last);
    case 1: return Tables<kValues, 1>::few(w, t, end, first, last);
    case 2: return Tables<kValues, 2>::few(w, t, end, first, last);
    case 3: return Tables<kValues, 3>::few(w, t, end, first, last);
  }
}
void table_values(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                  int64_t last) {
  if (w.values == kInt4)
    table_planes<kInt4>(w, t, end, first, last);
  else
    table_planes<kInt8>(w, t, end, first, last);
}

}  // namespace
}  // namespace slab
