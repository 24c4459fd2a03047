// Few tokens with int8 activations, on AVX2: no weight is rebuilt. A vector is a strip, 8 rows, of
// a quad: byte j of lane n belongs to group j of row n, as in int8_quads.h. The 16 inputs of a quad
// are the table of a byte shuffle, which reads one input for each row and group. Where it reads,
// at the kept and at the pruned positions, is the same for all tokens and follows from the codes.
//
// vpmaddubsw multiplies bytes without a sign by bytes with one and adds pairs of products within 16
// bits, where it would saturate. Here it cannot:
//   int4 values, at most 8, times x plus 128, at most 255: a pair is at most 4,080, and the sums of
//   a piece at most 16,320.
//   int8 values' magnitudes, at most 128 (127 in what is stored), times x with their signs, at most
//   127: a pair is at most 32,512, and pairs are widened at once.
//   With one plane the two pruned inputs of a group are added first, within 127. With more, levels
//   of at most 7 times x v, at most 127: a piece is at most 7,112.
#pragma once

#include <immintrin.h>

#include "int8_tokens.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kStripRows = 8, kStrips = kRows / kStripRows;

struct Lane {
  alignas(16) uint8_t at[16];
};
// For a shuffle: four bytes of each word, or 0 for those below 0. This is a whole vector, which the
// instruction itself can read from memory.
struct Order {
  alignas(32) uint8_t at[32];
};
constexpr Order bytes_of_words(int b0, int b1, int b2, int b3) {
  const int byte[4] = {b0, b1, b2, b3};
  Order t{};
  for (int i = 0; i < 32; ++i)
    t.at[i] = uint8_t(byte[i % 4] < 0 ? 0x80 : 4 * (i / 4 % 4) + byte[i % 4]);
  return t;
}
constexpr Order kHalves[2] = {bytes_of_words(0, -1, 1, -1), bytes_of_words(2, -1, 3, -1)};
constexpr Order kFourTimes[4] = {bytes_of_words(0, 0, 0, 0), bytes_of_words(1, 1, 1, 1),
                                 bytes_of_words(2, 2, 2, 2), bytes_of_words(3, 3, 3, 3)};
// For each code, the position (0 to 3) in its group that the code's pattern id gives.
constexpr Lane positions(int p0, int p1, int p2, int p3, int p4, int p5) {
  const int place[8] = {p0, p1, p2, p3, p4, p5, 0, 0};
  Lane t{};
  for (int c = 0; c < 16; ++c) t.at[c] = uint8_t(place[c & 7]);
  return t;
}
constexpr Lane kKeptFirst = positions(0, 0, 0, 1, 1, 2);
constexpr Lane kKeptSecond = positions(1, 2, 3, 2, 3, 3);
constexpr Lane kPrunedFirst = positions(2, 1, 1, 0, 0, 0);
constexpr Lane kPrunedSecond = positions(3, 3, 2, 3, 2, 1);
// For each code, -1 where its bit r is set, else 1.
constexpr Lane kSignOfCode = {{1, 1, 1, 1, 1, 1, 1, 1, 255, 255, 255, 255, 255, 255, 255, 255}};
// A nibble as a number from -8 to 7.
constexpr Lane kInt4OfNibble = {{0, 1, 2, 3, 4, 5, 6, 7, 248, 249, 250, 251, 252, 253, 254, 255}};
// The levels as integers. With three planes the field of a group is a nibble, the first position's
// bits below. With two it is two bits of a nibble: the lower ones, or the upper ones with zeros
// below them.
constexpr Lane level_lane(int planes, int second) {
  Lane t{};
  for (int i = 0; i < 16; ++i) {
    const int field = planes == 3 ? i : i < 4 ? i : i >> 2;
    const int bits = planes - 1, steps = (field >> (second ? bits : 0)) & ((1 << bits) - 1);
    t.at[i] = uint8_t(most_level(planes) - 2 * steps);
  }
  return t;
}
template <int kPlanes>
struct LevelLanes {
  static constexpr Lane first = level_lane(kPlanes, 0), second = level_lane(kPlanes, 1);
};

SLAB_INLINE __m256i both(const void* lane) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(lane)));
}
SLAB_INLINE __m256i table(const Lane& lane, __m256i index) {
  return _mm256_shuffle_epi8(both(lane.at), index);
}
SLAB_INLINE __m256i shuffled(__m256i words, const Order& order) {
  return _mm256_shuffle_epi8(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(order.at)));
}
SLAB_INLINE __m256i load_strip(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// A strip of a block.
template <ValueType kValues, int kPlanes>
struct Strip {
  const uint8_t *signs, *levels, *codes, *values, *scales;

  SLAB_INLINE void open(const uint8_t* block, int strip) {
    signs = block + 4 * kStripRows * strip;
    levels = signs + sign_bytes(kPlanes);
    codes = levels + level_bytes(kPlanes);
    values = block + sign_bytes(kPlanes) + level_bytes(kPlanes) + code_bytes();
    scales = values + value_bytes(kValues) + 2 * kStripRows * strip;
    values += strip * (kValues == kInt4 ? 4 * kStripRows : kStripRows);
  }
  // Byte j of each word: nibble 4 half + j. Two bytes are first put into 16 bits each, with zeros
  // above them.
  static SLAB_INLINE __m256i nibbles(__m256i word, int half) {
    const __m256i apart = shuffled(word, kHalves[half]);
    return _mm256_and_si256(_mm256_or_si256(apart, _mm256_slli_epi16(apart, 4)),
                            _mm256_set1_epi8(0x0F));
  }
  // -1 where the second pruned position of a group is negative, else 1.
  SLAB_INLINE __m256i negative(int word, int half) const {
    const __m256i eight = shuffled(load_strip(signs), kFourTimes[3 - word]);
    const __m256i bits = _mm256_set1_epi32(half ? 0x01020408 : 0x10204080);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(eight, bits), bits);
    return _mm256_or_si256(set, _mm256_set1_epi8(1));
  }
  // The levels' table indices.
  SLAB_INLINE __m256i fields(int word, int half) const {
    if constexpr (kPlanes == 3) return nibbles(load_strip(levels + 64 * word), half);
    const __m256i four =
        shuffled(load_strip(levels + 64 * (word / 2)), kFourTimes[2 * (word % 2) + half]);
    const __m256i nibble = _mm256_blend_epi16(four, _mm256_srli_epi16(four, 4), 0xAA);
    return _mm256_and_si256(nibble, _mm256_set1_epi16(0x0C03));
  }
  // The values of the first or the second kept positions of a quad.
  SLAB_INLINE __m256i kept_values(int quad, int second) const {
    if constexpr (kValues == kInt4) {
      const __m256i word = load_strip(values + 64 * quad);
      const __m256i low = second ? _mm256_srli_epi16(word, 4) : word;
      return table(kInt4OfNibble, _mm256_and_si256(low, _mm256_set1_epi8(0x0F)));
    } else {
      // [group][16 first, 16 second], of which the strip takes 8 and 8.
      __m128i group[4];
      for (int j = 0; j < 4; ++j)
        group[j] = _mm_loadl_epi64(
            reinterpret_cast<const __m128i*>(values + 128 * quad + 32 * j + 16 * second));
      const __m128i one = _mm_unpacklo_epi8(group[0], group[1]);
      const __m128i two = _mm_unpacklo_epi8(group[2], group[3]);
      return _mm256_setr_m128i(_mm_unpacklo_epi16(one, two), _mm_unpackhi_epi16(one, two));
    }
  }
};

// The product of a row block and kTokens tokens. With kKept it holds the kept values and the sign
// term of a rank, else the sign term alone.
template <ValueType kValues, int kPlanes, bool kKept, int kTokens>
struct StripTokens {
  static SLAB_INLINE __m256i ones() { return _mm256_set1_epi16(1); }
  static SLAB_INLINE __m256 bf16(const uint8_t* at) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  // y plus a step times the integers that a piece adds up to.
  static SLAB_INLINE __m256 add(__m256 y, __m256i sum, float step) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(step), y);
  }
  static SLAB_INLINE __m256i inputs(const int8_t* x) { return both(x); }
  // Where the inputs of a position lie among the 16 of a quad.
  static SLAB_INLINE __m256i places(const Lane& position, __m256i code) {
    return _mm256_or_si256(table(position, code), _mm256_set1_epi32(0x0C080400));
  }

  // The integers of a piece.
  struct Piece {
    __m256i kept[kStrips][kTokens];  // pairs in 16 bits for int4, else 32 bits
    // The sums of the values, which the shift multiplies: bytes for int4, else 32 bits.
    __m256i weights[kStrips];
    __m256i pruned[kStrips][kTokens];  // pairs in 16 bits

    SLAB_INLINE Piece() {
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        weights[s] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) kept[s][i] = pruned[s][i] = _mm256_setzero_si256();
      }
    }
    // The first or the second kept positions.
    template <class From>
    SLAB_INLINE void add_kept(const From* from, const __m256i* code, int quad, int second,
                              const int8_t* x) {
      const Lane& position = second ? kKeptSecond : kKeptFirst;
      __m256i place[kStrips], value[kStrips], size[kStrips];
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        place[s] = places(position, code[s]);
        value[s] = from[s].kept_values(quad, second);
        if constexpr (kValues == kInt4)
          weights[s] = _mm256_add_epi8(weights[s], value[s]);
        else
          weights[s] = _mm256_add_epi32(
              weights[s],
              _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), value[s]), ones()));
        if constexpr (kValues == kInt8) size[s] = _mm256_abs_epi8(value[s]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
        __m256i four = inputs(x + i * kInputs);
        if constexpr (kValues == kInt8) four = _mm256_xor_si256(four, _mm256_set1_epi8(-128));
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s) {
          const __m256i here = _mm256_shuffle_epi8(four, place[s]);
          if constexpr (kValues == kInt4) {
            kept[s][i] = _mm256_add_epi16(kept[s][i], _mm256_maddubs_epi16(here, value[s]));
          } else {
            const __m256i pairs = _mm256_maddubs_epi16(size[s], _mm256_sign_epi8(here, value[s]));
            kept[s][i] = _mm256_add_epi32(kept[s][i], _mm256_madd_epi16(pairs, ones()));
          }
        }
      }
    }
    template <class From>
    SLAB_INLINE void add_pruned(const From* from, const __m256i* code, int word, int half,
                                const int8_t* xv) {
      __m256i place[2][kStrips], negative[2][kStrips], size[2][kStrips];
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        place[0][s] = places(kPrunedFirst, code[s]);
        place[1][s] = places(kPrunedSecond, code[s]);
        negative[0][s] = table(kSignOfCode, code[s]);
        negative[1][s] = from[s].negative(word, half);
        if constexpr (kPlanes > 1) {
          const __m256i field = from[s].fields(word, half);
          size[0][s] = table(LevelLanes<kPlanes>::first, field);
          size[1][s] = table(LevelLanes<kPlanes>::second, field);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
        const __m256i four = inputs(xv + i * kInputs);
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s) {
          const __m256i one =
              _mm256_sign_epi8(_mm256_shuffle_epi8(four, place[0][s]), negative[0][s]);
          const __m256i two = _mm256_shuffle_epi8(four, place[1][s]);
          if constexpr (kPlanes == 1) {
            const __m256i both = _mm256_sign_epi8(_mm256_add_epi8(one, two), negative[1][s]);
            pruned[s][i] =
                _mm256_add_epi16(pruned[s][i], _mm256_maddubs_epi16(_mm256_set1_epi8(1), both));
          } else {
            const __m256i first = _mm256_maddubs_epi16(size[0][s], one);
            const __m256i second =
                _mm256_maddubs_epi16(size[1][s], _mm256_sign_epi8(two, negative[1][s]));
            pruned[s][i] = _mm256_add_epi16(pruned[s][i], _mm256_add_epi16(first, second));
          }
        }
      }
    }
    // The kept sums with the shift, which was lessened by 128.
    SLAB_INLINE __m256i kept_total(int s, int i, int32_t shift) const {
      if constexpr (kValues == kInt4) {
        const __m256i all = _mm256_maddubs_epi16(_mm256_set1_epi8(1), weights[s]);
        return _mm256_add_epi32(_mm256_madd_epi16(kept[s][i], ones()),
                                _mm256_madd_epi16(all, _mm256_set1_epi16(int16_t(shift))));
      }
      return _mm256_add_epi32(
          kept[s][i], _mm256_mullo_epi32(weights[s], _mm256_set1_epi32(int16_t(shift) + 128)));
    }
  };

  // What is summed of a strip and a token, in units of the scale and of u; see int8_tables.h.
  struct Sums {
    __m256 y, kept_of_x, pruned_of_x;
  };

  // One block of inputs. at: of its first token in term 0; other: in the term of the rank.
  static SLAB_INLINE void multiply_block(const CpuWeight& w, const Int8Tokens& t,
                                         const uint8_t* block, int64_t at, int64_t other,
                                         Sums (*to)[kTokens]) {
    const int scale_words = w.group_size / kPiece;
    Strip<kValues, kPlanes> from[kStrips];
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) from[s].open(block, s);
#pragma GCC unroll 4
    for (int word = 0; word < kPieces; ++word) {
      Piece piece;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i code[kStrips];
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s)
          code[s] = from[s].nibbles(load_strip(from[s].codes + 64 * word), half);
        const int first = kPiece * word + kPiece / 2 * half;
        if constexpr (kKept)
#pragma GCC unroll 2
          for (int second = 0; second < 2; ++second)
            piece.add_kept(from, code, 2 * word + half, second, t.x + at * kInputs + first);
        if constexpr (kPlanes > 0)
          piece.add_pruned(from, code, word, half, t.x + other * kInputs + first);
      }
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) {
          const int64_t here = (at + i) * kPieces + word, there = (other + i) * kPieces + word;
          Sums& sums = to[s][i];
          if constexpr (kKept)
            sums.kept_of_x =
                add(sums.kept_of_x, piece.kept_total(s, i, t.shift[here]), t.step[here]);
          if constexpr (kPlanes > 0)
            sums.pruned_of_x =
                add(sums.pruned_of_x, _mm256_madd_epi16(piece.pruned[s][i], ones()), t.step[there]);
        }
      if constexpr (kKept)
        if (((word + 1) & (scale_words - 1)) == 0)  // a power of two
#pragma GCC unroll 2
          for (int s = 0; s < kStrips; ++s) {
            const __m256 scale = bf16(from[s].scales + 2 * kRows * (word / scale_words));
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; ++i) {
              to[s][i].y = _mm256_fmadd_ps(scale, to[s][i].kept_of_x, to[s][i].y);
              to[s][i].kept_of_x = _mm256_setzero_ps();
            }
          }
    }
  }

  // sums[i][row] += the products of tokens [token, token + kTokens).
  static void multiply(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t token,
                       int64_t rank, float* sums) {
    Sums of[kStrips][kTokens];
    for (int s = 0; s < kStrips; ++s)
      for (int i = 0; i < kTokens; ++i)
        of[s][i] = {_mm256_loadu_ps(sums + i * kRows + kStripRows * s), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      const int64_t at = kb * t.count + token, other = ((1 + rank) * w.k_blocks) * t.count + at;
      multiply_block(w, t, w.stream + (rb * w.k_blocks + kb) * w.block_size, at, other, of);
    }
    for (int s = 0; s < kStrips; ++s) {
      __m256 scale = _mm256_setzero_ps();
      if constexpr (kPlanes > 0)
        scale = _mm256_mul_ps(_mm256_loadu_ps(w.u + (rb * w.rank + rank) * kRows + kStripRows * s),
                              _mm256_set1_ps(level_unit(kPlanes)));
      for (int i = 0; i < kTokens; ++i)
        _mm256_storeu_ps(sums + i * kRows + kStripRows * s,
                         _mm256_fmadd_ps(scale, of[s][i].pruned_of_x, of[s][i].y));
    }
  }
};

// For x, unlike for x v_r, the integers plus 128 are stored, and shifts are less by that.
void quantise_for_strips(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                         int64_t token) {
  quantise_few(w, t, x, term, token);
  if (term) return;
  for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
    const int64_t at = kb * t.count + token;
    for (int i = 0; i < kInputs; ++i) t.x[at * kInputs + i] ^= int8_t(-128);
    for (int p = 0; p < kPieces; ++p) {
      int32_t& shift = t.shift[at * kPieces + p];
      shift = shift_word(shift - 128);
    }
  }
}

template <ValueType kValues, int kPlanes>
struct Strips {
  template <int kTokens>
  static void rows(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t rb,
                   int64_t token) {
    alignas(32) float sums[kTokens * kRows];
    std::memset(sums, 0, sizeof(sums));
    StripTokens<kValues, kPlanes, true, kTokens>::multiply(w, t, rb, token, 0, sums);
    if constexpr (kPlanes > 0)
      for (int64_t r = 1; r < w.rank; ++r)
        StripTokens<kValues, kPlanes, false, kTokens>::multiply(w, t, rb, token, r, sums);
    end.finish(w, *end.tokens, rb, token, kTokens, sums, kRows);
  }
  static void few(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                  int64_t last) {
    for (int64_t rb = first; rb < last; ++rb) {
      int64_t token = 0;
      for (; token + 4 <= t.count; token += 4) rows<4>(w, t, end, rb, token);
      for (; token + 2 <= t.count; token += 2) rows<2>(w, t, end, rb, token);
      if (token < t.count) rows<1>(w, t, end, rb, token);
    }
  }
};

void strips(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
            int64_t last) {
  for_integers(w, [&](auto values, auto planes) {
    Strips<ValueType(values.value), planes.value>::few(w, t, end, first, last);
  });
}

}  // namespace
}  // namespace slab
