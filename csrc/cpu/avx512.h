// The vector type of AVX-512 (F, BW, DQ, VL): 16 lanes, so one zmm is a row block. Each of a
// group's three tables is one zmm.
#pragma once

#include <immintrin.h>

#include "stream.h"

namespace slab {
namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16, kLookupBlocks = 4, kPairBlocks = 2, kPairRank = 2,
                       kLookupTokens = 4, kRank0LookupTokens = 4, kTokens = 12;
  static constexpr int kUnrollRank = 2;
  using F = __m512;
  typedef uint32_t I __attribute__((vector_size(64)));

  static SLAB_INLINE F zero() { return _mm512_setzero_ps(); }
  static SLAB_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static SLAB_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static SLAB_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static SLAB_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Transposes 16 x 16 numbers, whose rows are so far apart.
  static SLAB_INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
    F pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      const F a = load(from + i * stride), b = load(from + (i + 1) * stride);
      pairs[i] = _mm512_unpacklo_ps(a, b);
      pairs[i + 1] = _mm512_unpackhi_ps(a, b);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xEE);
      }
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        eights[i + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0x88);
        eights[i + j + 4] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0xDD);
      }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      store(to + j * to_stride, _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0x88));
      store(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0xDD));
    }
  }
  static SLAB_INLINE I load_words(const uint8_t* p) { return (I)_mm512_loadu_si512(p); }

  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    if constexpr (kValues == kFp16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    if constexpr (kValues == kBf16)
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    if constexpr (kValues == kInt8)
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static SLAB_INLINE F from_int4(I word, int shift) {
    const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps((__m512i)(word >> shift), table);
  }

  // Lane c of a table answers code c, which is pattern id c & 7 (6 and 7 do not occur) and r = c >>
  // 3.
  struct Kept {
    F first, second;
  };
  static SLAB_INLINE Kept kept_table(const float* x) {
    const F four = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    return {_mm512_permutevar_ps(four,
                                 _mm512_setr_epi32(0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0)),
            _mm512_permutevar_ps(
                four, _mm512_setr_epi32(1, 2, 3, 2, 3, 3, 0, 0, 1, 2, 3, 2, 3, 3, 0, 0))};
  }
  static SLAB_INLINE F first(const Kept& t, I code) {
    return _mm512_permutexvar_ps((__m512i)code, t.first);
  }
  static SLAB_INLINE F second(const Kept& t, I code) {
    return _mm512_permutexvar_ps((__m512i)code, t.second);
  }

  static SLAB_INLINE F signed_by(F v, I bits) {
    const __m512i word = _mm512_castps_si512(v), top = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(word, (__m512i)bits, top, 0x78));  // a ^ (b & c)
  }

  // The two pruned positions, the first one negated where r is set. For several planes they are
  // apart, for one they are added up.
  static constexpr bool kSignedTable = true;
  using Apart = Kept;
  static SLAB_INLINE Apart apart_table(const float* xv) {
    const F four = _mm512_broadcast_f32x4(_mm_loadu_ps(xv));
    const F one = _mm512_permutevar_ps(
        four, _mm512_setr_epi32(2, 1, 1, 0, 0, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0));
    const F two = _mm512_permutevar_ps(
        four, _mm512_setr_epi32(3, 3, 2, 3, 2, 1, 0, 0, 3, 3, 2, 3, 2, 1, 0, 0));
    const F minus = _mm512_setr_ps(0, 0, 0, 0, 0, 0, 0, 0, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f,
                                   -0.0f, -0.0f);
    return {_mm512_xor_ps(one, minus), two};
  }
  using Pruned = F;
  static SLAB_INLINE Pruned pruned_table(const float* xv) {
    const Apart t = apart_table(xv);
    return _mm512_add_ps(t.second, t.first);
  }
  static SLAB_INLINE F pruned(Pruned t, I code, I flip) {
    return signed_by(_mm512_permutexvar_ps((__m512i)code, t), flip);
  }

  // The magnitudes of the two pruned positions' factors, from the fields of `levels`; what stands
  // above the fields is not read.
  template <int kPlanes>
  static SLAB_INLINE Kept sizes(I level) {
    const __m512i at = (__m512i)level;
    if constexpr (kPlanes == 2)
      return {_mm512_permutevar_ps(_mm512_setr4_ps(1.5f, 0.5f, 1.5f, 0.5f), at),
              _mm512_permutevar_ps(_mm512_setr4_ps(1.5f, 1.5f, 0.5f, 0.5f), at)};
    const F high = _mm512_setr_ps(1.75f, 1.75f, 1.75f, 1.75f, 1.25f, 1.25f, 1.25f, 1.25f, 0.75f,
                                  0.75f, 0.75f, 0.75f, 0.25f, 0.25f, 0.25f, 0.25f);
    return {_mm512_permutevar_ps(_mm512_setr4_ps(1.75f, 1.25f, 0.75f, 0.25f), at),
            _mm512_permutexvar_ps(at, high)};
  }

  static constexpr bool kMoved = false;
  static SLAB_INLINE I places(I code) {
    const __m256i table = _mm256_loadu_si256((const __m256i*)kPlaceWords);
    return (I)_mm512_permutexvar_epi32((__m512i)code, _mm512_broadcast_i32x8(table));
  }
  static SLAB_INLINE F choose(I bits, int bit, F yes, F no) {
    return _mm512_mask_mov_ps(
        no, _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(int(1u << bit))), yes);
  }

  static SLAB_INLINE void store_fp16(uint16_t* p, F v) {
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static SLAB_INLINE void store_bf16(uint16_t* p, F v) {
    const I bits = (I)_mm512_castps_si512(v);
    const __m512i round = (__m512i)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    const __m512i quiet = (__m512i)((bits >> 16) | 0x40u);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(round, nan, quiet)));
  }
};

}  // namespace
}  // namespace slab
