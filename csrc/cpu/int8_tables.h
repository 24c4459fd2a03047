// Few tokens with int8 activations, on AVX-512 with VBMI: no weight is rebuilt. For each group of a
// quad (int8_quads.h) a table of 16 bytes is indexed by the code of a row, so that one byte
// permutation of 64 answers four groups of 16 rows, and one vpdpbusd multiplies all of them. Tables
// of 128 bytes belong to a quad: first the entries of the first position of a code, then those of
// the second, in x plus 128. For x these are the kept positions, for x v_r the pruned ones, the
// first of them negated where the code says so.
//
// The shift of a piece, less the 128 of the tables, meets the sum of the multipliers, which all
// tokens share.
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

// pairs: one table of 64 bytes a quad, whose entries are the sums of both positions.
inline void write_tables(const int8_t* x, bool pruned, bool pairs, uint8_t* out) {
  const __m512i first = load_bytes(pruned ? kPrunedFirst : kKeptFirst),
                second = load_bytes(pruned ? kPrunedSecond : kKeptSecond);
  const __mmask64 negated = pruned ? 0xFF00FF00FF00FF00ull : 0;
  const __m512i flip = _mm512_set1_epi8(-128);
  for (int q = 0; q < kQuads; ++q) {
    const __m512i quad = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + 16 * q)));
    const __m512i one = _mm512_shuffle_epi8(quad, first);
    const __m512i two = _mm512_shuffle_epi8(quad, second);
    const __m512i some = _mm512_mask_sub_epi8(one, negated, _mm512_setzero_si512(), one);
    if (pairs) {
      const __m512i sum = _mm512_add_epi8(some, two);
      _mm512_storeu_si512(out + 64 * q, _mm512_xor_si512(sum, flip));
      continue;
    }
    _mm512_storeu_si512(out + 128 * q, _mm512_xor_si512(some, flip));
    _mm512_storeu_si512(out + 128 * q + 64, _mm512_xor_si512(two, flip));
  }
}

// Tables for `few`, or else x in the order of the panels of `many`.
void quantise_for_quads(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                        int64_t token) {
  if (t.pieces) return quantise_for_quad_panels(w, t, x, token);
  quantise_few(w, t, x, term, token);
  for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
    const int64_t at = (term * w.k_blocks + kb) * t.count + token;
    write_tables(t.x + at * kInputs, term > 0, term > 0 && w.planes == 1,
                 t.tables + at * kTableBytes);
    for (int p = 0; p < kPieces; ++p) {
      int32_t& shift = t.shift[at * kPieces + p];
      shift = shift_word(shift - 128);
    }
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
  // y plus a step times the integers that a piece adds up to.
  static SLAB_INLINE __m512 add(__m512 y, __m512i sum, float step) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(step), y);
  }
  // The sum with a shift, which meets the sum of what the integers were multiplied by.
  static SLAB_INLINE __m512i shifted(__m512i sum, __m512i weights, int32_t shift) {
    return _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32(shift));
  }

  // sums[i][16 b + row] += the products of tokens [token, token + kTokens).
  static void multiply(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t token,
                       int64_t rank, float* sums) {
    const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    // In units of the scale and of u. These are sums of x's size: a scale times a step, which may
    // overflow where the integers add up to 0, is never formed.
    __m512 kept_of_x[kTokens][kBlocks], pruned_of_x[kTokens][kBlocks], y[kTokens][kBlocks];
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        y[i][b] = _mm512_loadu_ps(sums + (i * kBlocks + b) * kRows);
        kept_of_x[i][b] = pruned_of_x[i][b] = _mm512_setzero_ps();
      }
    const int scale_words = w.group_size / kPiece;
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const int64_t at = kb * t.count + token, other = ((1 + rank) * w.k_blocks) * t.count + at;
      const uint8_t* const x_tables = t.tables + at * kTableBytes;
      const uint8_t* const v_tables = t.tables + other * kTableBytes;
      QuadRow<kValues, kPlanes> row[kBlocks];
      __m512i positive[kBlocks];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* const block = w.stream + ((rb + b) * w.k_blocks + kb) * w.block_size;
        fetch(block + kAhead, w.block_size);
        row[b].open(block);
        if constexpr (kPlanes == 1) positive[b] = row[b].positive_twos();
      }
      for (int word = 0; word < kPieces; ++word) {
        __m512i kept[kTokens][kBlocks], pruned[kTokens][kBlocks];
        __m512i kept_weights[kBlocks], pruned_weights[kBlocks];
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) {
          row[b].load_word(word);
          kept_weights[b] = pruned_weights[b] = zero;
          __m512i start = zero;
          // With one plane all that is multiplied is a sign, and the shift is -128: it makes 1024
          // of a word without positive signs, and 256 less for each of them.
          if constexpr (kPlanes == 1)
            start = _mm512_dpbusd_epi32(_mm512_set1_epi32(1024), positive[b],
                                        _mm512_set1_epi32(int(0x80000000u >> (8 * word))));
#pragma GCC unroll 16
          for (int i = 0; i < kTokens; ++i) kept[i][b] = zero, pruned[i][b] = start;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int quad = 2 * word + half;
          __m512i index[kBlocks];
          Multipliers by[kBlocks];
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b) {
            index[b] = row[b].codes_of(half, 0x30201000);
            if constexpr (kKept) {
              row[b].kept_values(quad, 0, by[b].kept);
#pragma GCC unroll 16
              for (int p = 0; p < 2; ++p)
                kept_weights[b] = _mm512_dpbusd_epi32(kept_weights[b], ones, by[b].kept[p]);
            }
            if constexpr (kPlanes > 0) row[b].levels_of(quad, by[b].pruned);
            if constexpr (kPlanes > 1)
#pragma GCC unroll 16
              for (int p = 0; p < 2; ++p)
                pruned_weights[b] = _mm512_dpbusd_epi32(pruned_weights[b], ones, by[b].pruned[p]);
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
              if (kPlanes > 1 || (kPlanes == 1 && p == 0)) {
                const __m512i xv = _mm512_loadu_si512(
                    v_tables + (kPlanes == 1 ? i * kTableBytes + 64 * quad : table));
#pragma GCC unroll 16
                for (int b = 0; b < kBlocks; ++b)
                  pruned[i][b] = _mm512_dpbusd_epi32(
                      pruned[i][b], _mm512_permutexvar_epi8(index[b], xv), by[b].pruned[p]);
              }
            }
        }
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (kKept)
#pragma GCC unroll 16
            for (int i = 0; i < kTokens; ++i) {
              const int64_t piece = (at + i) * kPieces + word;
              const __m512i sum = shifted(kept[i][b], kept_weights[b], t.shift[piece]);
              kept_of_x[i][b] = add(kept_of_x[i][b], sum, t.step[piece]);
            }
          if constexpr (kPlanes > 0)
#pragma GCC unroll 16
            for (int i = 0; i < kTokens; ++i) {
              const int64_t piece = (other + i) * kPieces + word;
              __m512i sum = pruned[i][b];
              if constexpr (kPlanes > 1) sum = shifted(sum, pruned_weights[b], t.shift[piece]);
              pruned_of_x[i][b] = add(pruned_of_x[i][b], sum, t.step[piece]);
            }
        }
        if constexpr (kKept)
          if (((word + 1) & (scale_words - 1)) == 0)  // a power of two
#pragma GCC unroll 16
            for (int b = 0; b < kBlocks; ++b) {
              const __m512 unit = _mm512_set1_ps(kValues == kInt4 ? 0.0625f : 1.0f);
              const uint8_t* const scales = row[b].scales + 2 * kRows * (word / scale_words);
              const __m512 scale = _mm512_mul_ps(bf16(scales), unit);
#pragma GCC unroll 16
              for (int i = 0; i < kTokens; ++i) {
                y[i][b] = _mm512_fmadd_ps(scale, kept_of_x[i][b], y[i][b]);
                kept_of_x[i][b] = _mm512_setzero_ps();
              }
            }
      }
    }
    if constexpr (kPlanes > 0)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        const float* const u = w.u + ((rb + b) * w.rank + rank) * kRows;
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(u), _mm512_set1_ps(level_unit(kPlanes)));
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i)
          y[i][b] = _mm512_fmadd_ps(scale, pruned_of_x[i][b], y[i][b]);
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

void tables(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
            int64_t last) {
  for_integers(w, [&](auto values, auto planes) {
    Tables<ValueType(values.value), planes.value>::few(w, t, end, first, last);
  });
}

}  // namespace
}  // namespace slab
