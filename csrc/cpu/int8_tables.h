// Few tokens with int8 activations, on AVX-512 with VBMI: no weight is rebuilt. For each group of a
// quad (int8_quads.h) a table of 16 bytes is indexed by the code of a row, so that one byte
// permutation of 64 answers four groups of 16 rows, and one vpdpbusd multiplies all of them. Tables
// of 128 bytes belong to a quad: first the entries of the first position of a code, then those of
// the second, in x plus 128. For x these are the kept positions, for x v_r the pruned ones, the
// first of them negated where the code says so.
//
// The 128 of the tables is taken off again by the sum of the multipliers, which all tokens share.
#pragma once

#include "int8_quad_panel.h"
#include "int8_tokens.h"

namespace slab {
namespace {

constexpr int kTableBytes = 1024;  // of a term of a token in a block

// How far ahead of two row blocks the stream is brought into the second-level cache. On an AMD EPYC
// (Zen 4), 11008x4096 with int4 values and one token: 0.93 ms, 1.48 without; 0.95 to 1.02 at 2048
// or 8192 bytes with four row blocks. Into the first-level cache it takes longer than without.
constexpr int64_t kAhead = 4096;

SLAB_INLINE void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

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

// Tables for `few`, or else x in the order of the panels of `many`.
void quantise_for_quads(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                        int64_t token) {
  quantise(w, t, x, term, token);
  for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
    const int64_t at = (term * w.k_blocks + kb) * t.count + token;
    if (t.tables)
      write_tables(t.x + at * kInputs, term > 0, t.tables + at * kTableBytes);
    else
      order_for_panels(t.x + at * kInputs);
  }
}

// kBlocks row blocks and kTokens tokens. kKept: kept values too, not only the sign term of a rank.
template <ValueType kValues, int kPlanes, bool kKept, int kTokens, int kBlocks>
struct TableBlocks {
  struct Multipliers {
    __m512i kept[2], pruned[2];  // for the first and the second position
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
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) y[i][b] = _mm512_loadu_ps(sums + (i * kBlocks + b) * kRows);
    const int scale_words = w.group_size / 32;
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const int64_t at = kb * t.count + token, other = ((1 + rank) * w.k_blocks) * t.count + at;
      const uint8_t* const x_tables = t.tables + at * kTableBytes;
      const uint8_t* const v_tables = t.tables + other * kTableBytes;
      QuadRow<kValues, kPlanes> row[kBlocks];
      __m512i kept[kTokens][kBlocks], pruned[kTokens][kBlocks];
      __m512i kept_excess[kBlocks], pruned_excess[kBlocks];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* const block = w.stream + ((rb + b) * w.k_blocks + kb) * w.block_size;
        fetch(block + kAhead, w.block_size);
        row[b].open(block);
        kept_excess[b] = pruned_excess[b] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) kept[i][b] = pruned[i][b] = _mm512_setzero_si512();
      }
      for (int word = 0; word < 4; ++word) {
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) row[b].load_word(word);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int quad = 2 * word + half;
          __m512i index[kBlocks];
          Multipliers by[kBlocks];
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b) {
            index[b] = row[b].codes_of(half, 0x30201000);
            if constexpr (kKept) {
              row[b].kept_values(quad, by[b].kept);
#pragma GCC unroll 16
              for (int p = 0; p < 2; ++p)
                kept_excess[b] = _mm512_dpbusd_epi32(kept_excess[b], excess, by[b].kept[p]);
            }
            if constexpr (kPlanes > 0) row[b].levels_of(quad, by[b].pruned);
            if constexpr (kPlanes > 1)
#pragma GCC unroll 16
              for (int p = 0; p < 2; ++p)
                pruned_excess[b] = _mm512_dpbusd_epi32(pruned_excess[b], excess, by[b].pruned[p]);
          }
#pragma GCC unroll 8
          for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
            for (int p = 0; p < 2; ++p) {
              const int64_t table = i * kTableBytes + 128 * quad + 64 * p;
              if constexpr (kKept) {
                const __m512i x = _mm512_loadu_si512(x_tables + table);
#pragma GCC unroll 16
                for (int b = 0; b < kBlocks; ++b)
                  kept[i][b] = _mm512_dpbusd_epi32(kept[i][b], _mm512_permutexvar_epi8(index[b], x),
                                                   by[b].kept[p]);
              }
              if constexpr (kPlanes > 0) {
                const __m512i xv = _mm512_loadu_si512(v_tables + table);
#pragma GCC unroll 16
                for (int b = 0; b < kBlocks; ++b)
                  pruned[i][b] = _mm512_dpbusd_epi32(
                      pruned[i][b], _mm512_permutexvar_epi8(index[b], xv), by[b].pruned[p]);
              }
            }
        }
        if constexpr (kKept)
          if ((word + 1) % scale_words == 0)
#pragma GCC unroll 16
            for (int b = 0; b < kBlocks; ++b) {
              const __m512 unit = _mm512_set1_ps(kValues == kInt4 ? 0.0625f : 1.0f);
              const uint8_t* const scales = row[b].scales + 2 * kRows * (word / scale_words);
              const __m512 scale = _mm512_mul_ps(bf16(scales), unit);
#pragma GCC unroll 16
              for (int i = 0; i < kTokens; ++i) {
                y[i][b] = add(y[i][b], kept[i][b], kept_excess[b], scale, t.step[at + i]);
                kept[i][b] = _mm512_setzero_si512();
              }
              kept_excess[b] = _mm512_setzero_si512();
            }
      }
      if constexpr (kPlanes > 0)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (kPlanes == 1) {  // 256 for a sum of two, less 512 where it is negative
            const __m512i negative = _mm512_popcnt_epi32(row[b].signs);
            pruned_excess[b] =
                _mm512_sub_epi32(_mm512_set1_epi32(256 * kGroups), _mm512_slli_epi32(negative, 9));
          }
          const float* const u = w.u + ((rb + b) * w.rank + rank) * kRows;
          const __m512 scale =
              _mm512_mul_ps(_mm512_loadu_ps(u), _mm512_set1_ps(level_unit(kPlanes)));
#pragma GCC unroll 16
          for (int i = 0; i < kTokens; ++i)
            y[i][b] = add(y[i][b], pruned[i][b], pruned_excess[b], scale, t.step[other + i]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(sums + (i * kBlocks + b) * kRows, y[i][b]);
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
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b)
      end.finish(w, *end.tokens, rb + b, token, kTokens, sums + b * kRows, kBlocks * kRows);
  }
  static void few(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                  int64_t last) {
    int64_t rb = first;
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
