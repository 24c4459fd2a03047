// The vector type of AVX2 with FMA and F16C: 8 lanes, so two strips per row block. A table has 8
// entries, so the four activations of a group and their products with v are looked up one by one,
// and their signs are flipped afterwards.
#pragma once

#include <immintrin.h>

#include "stream.h"

namespace slab {
namespace {

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8, kLookupBlocks = 1, kPairBlocks = 1, kPairRank = 4,
                       kLookupTokens = 3, kRank0LookupTokens = 4, kTokens = 6;
  static constexpr int kUnrollRank = 1;
  using F = __m256;
  typedef uint32_t I __attribute__((vector_size(32)));

  static SLAB_INLINE F zero() { return _mm256_setzero_ps(); }
  static SLAB_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static SLAB_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static SLAB_INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static SLAB_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // Transposes 8 x 8 numbers, whose rows are so far apart.
  static SLAB_INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
    F pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      const F a = load(from + i * stride), b = load(from + (i + 1) * stride);
      pairs[i] = _mm256_unpacklo_ps(a, b);
      pairs[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xEE);
      }
    for (int i = 0; i < 4; ++i) {
      store(to + i * to_stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
      store(to + (i + 4) * to_stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
  }
  static SLAB_INLINE I load_words(const uint8_t* p) {
    return (I)_mm256_loadu_si256((const __m256i*)p);
  }

  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    if constexpr (kValues == kFp16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    if constexpr (kValues == kBf16)
      return _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    if constexpr (kValues == kInt8)
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static SLAB_INLINE F from_int4(I word, int shift) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32((__m256i)(word << (28 - shift)), 28));
  }

  // Entry id of a table answers pattern id. A lookup reads the low 3 bits of its index, so r, which
  // is bit 3, does not disturb it.
  struct Pair {
    F first, second;
  };
  // A table whose entry i is input e<i> of the four. Bytes are shuffled (vpshufb), since on AMD's
  // Zen 1 a shuffle of words whose order lies in a register (vpermilps) takes four times as long.
  static SLAB_INLINE F entries(F four, int e0, int e1, int e2, int e3, int e4, int e5) {
    const auto bytes = [](int entry) { return 0x03020100 + 0x04040404 * entry; };
    const __m256i order = _mm256_setr_epi32(bytes(e0), bytes(e1), bytes(e2), bytes(e3), bytes(e4),
                                            bytes(e5), bytes(0), bytes(0));
    return (F)_mm256_shuffle_epi8((__m256i)four, order);
  }
  using Kept = Pair;
  static SLAB_INLINE Kept kept_table(const float* x) {
    const F four = _mm256_broadcast_ps((const __m128*)x);
    return {entries(four, 0, 0, 0, 1, 1, 2), entries(four, 1, 2, 3, 2, 3, 3)};
  }
  static SLAB_INLINE F first(const Kept& t, I code) {
    return _mm256_permutevar8x32_ps(t.first, (__m256i)code);
  }
  static SLAB_INLINE F second(const Kept& t, I code) {
    return _mm256_permutevar8x32_ps(t.second, (__m256i)code);
  }

  using Pruned = Pair;
  static SLAB_INLINE Pruned pruned_table(const float* xv) {
    const F four = _mm256_broadcast_ps((const __m128*)xv);
    return {entries(four, 2, 1, 1, 0, 0, 0), entries(four, 3, 3, 2, 3, 2, 1)};
  }
  static SLAB_INLINE F signed_by(F v, I bits) {
    return _mm256_xor_ps(v, _mm256_castsi256_ps((__m256i)(bits & 0x80000000u)));
  }
  static SLAB_INLINE F pruned(const Pruned& t, I code, I flip) {
    const F one = signed_by(first(t, code), code << 28);
    return signed_by(_mm256_add_ps(second(t, code), one), flip);
  }

  // For several planes the two pruned positions are looked up apart anyway, and the caller applies
  // r.
  static constexpr bool kSignedTable = false;
  using Apart = Pair;
  static SLAB_INLINE Apart apart_table(const float* xv) { return pruned_table(xv); }
  // The magnitudes of the two pruned positions' factors, from the fields of `levels`. vpermilps
  // reads the low 2 bits.
  template <int kPlanes>
  static SLAB_INLINE Pair sizes(I level) {
    if constexpr (kPlanes == 2) {
      const F first = _mm256_setr_ps(1.5f, 0.5f, 1.5f, 0.5f, 1.5f, 0.5f, 1.5f, 0.5f);
      const F second = _mm256_setr_ps(1.5f, 1.5f, 0.5f, 0.5f, 1.5f, 1.5f, 0.5f, 0.5f);
      return {_mm256_permutevar_ps(first, (__m256i)level),
              _mm256_permutevar_ps(second, (__m256i)level)};
    }
    const F table = _mm256_setr_ps(1.75f, 1.25f, 0.75f, 0.25f, 1.75f, 1.25f, 0.75f, 0.25f);
    return {_mm256_permutevar_ps(table, (__m256i)level),
            _mm256_permutevar_ps(table, (__m256i)(level >> 2))};
  }

  static constexpr bool kMoved = true;
  static SLAB_INLINE I places(I code) {
    const __m256i table = _mm256_loadu_si256((const __m256i*)kPlaceWords);
    return (I)_mm256_permutevar8x32_epi32(table, (__m256i)code);
  }
  // The bit is always 31, since the words are moved.
  static SLAB_INLINE F choose(I words, int, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps((__m256i)words));
  }

  static SLAB_INLINE void store_fp16(uint16_t* p, F v) {
    _mm_storeu_si128((__m128i*)p,
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static SLAB_INLINE void store_bf16(uint16_t* p, F v) {
    const I bits = (I)_mm256_castps_si256(v);
    const F round = _mm256_castsi256_ps((__m256i)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16));
    const F quiet = _mm256_castsi256_ps((__m256i)((bits >> 16) | 0x40u));
    const __m256i out =
        _mm256_castps_si256(_mm256_blendv_ps(round, quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const __m128i low = _mm256_castsi256_si128(out), high = _mm256_extracti128_si256(out, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
  }
};

}  // namespace
}  // namespace slab
