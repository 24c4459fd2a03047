// int8 activations with AVX2 and FMA. In `many` vpmaddubsw multiplies the weight's magnitude, at
// most 128, by x times the weight's sign, at most 127: a pair is at most 32,512, so 16 bits hold
// it.
#include "../int8.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "int8_panel.h"
#include "int8_shuffle.h"

namespace slab {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kPanelTokens = 4, kPanelBlocks = 1, kWeightOffset = 0;
  static constexpr bool kQuads = false;
  using F = __m256;
  typedef uint32_t I __attribute__((vector_size(32)));
  typedef int32_t S __attribute__((vector_size(32)));
  typedef int16_t H __attribute__((vector_size(32)));

  static SLAB_INLINE F zero() { return _mm256_setzero_ps(); }
  static SLAB_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static SLAB_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static SLAB_INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static SLAB_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static SLAB_INLINE I load_words(const uint8_t* p) {
    return (I)_mm256_loadu_si256((const __m256i*)p);
  }
  static SLAB_INLINE void store_words(uint8_t* p, I v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)v);
  }
  static SLAB_INLINE I load_bytes(const uint8_t* p) {
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  }
  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    static_assert(kValues == kBf16);
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static SLAB_INLINE bool all(S mask) {
    return _mm256_movemask_ps(_mm256_castsi256_ps((__m256i)mask)) == 0xFF;
  }
  static SLAB_INLINE I to_int(F x) { return (I)_mm256_cvtps_epi32(x); }
  static SLAB_INLINE F to_float(I x) { return _mm256_cvtepi32_ps((__m256i)x); }

  static SLAB_INLINE I lookup(const uint32_t* table, I code) {
    const __m256i entries = _mm256_load_si256((const __m256i*)table);
    return (I)_mm256_permutevar8x32_epi32(entries, (__m256i)code);
  }
  static SLAB_INLINE I place(I bytes, I order) {
    const __m256i lanes = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0, 0x04040404,
                                            0x08080808, 0x0C0C0C0C);
    return (I)_mm256_shuffle_epi8((__m256i)bytes, _mm256_or_si256((__m256i)order, lanes));
  }
  static SLAB_INLINE H pair(const int16_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return (H)_mm256_set1_epi32(word);
  }
  static SLAB_INLINE H mulhrs(H a, H b) { return (H)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
  static SLAB_INLINE I sign(I m, I l) { return (I)_mm256_sign_epi8((__m256i)m, (__m256i)l); }
  static SLAB_INLINE I top_byte(I words, const int32_t* shift) {
    const __m256i moved = _mm256_sllv_epi32((__m256i)words, _mm256_set1_epi32(*shift));
    return (I)_mm256_srai_epi32(moved, 24);
  }
  static SLAB_INLINE I dot(I acc, I weight, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i signs = (__m256i)weight, size = _mm256_abs_epi8(signs);
    const __m256i pairs =
        _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), signs));
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

void quantise_for_groups(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                         int64_t token) {
  if (!t.pieces) return quantise_for_strips(w, t, x, term, token);
  quantise_many(w, t, x, token, Avx2::kWeightOffset, [](Int8Piece& piece, int at) {
    piece.place = at / kGroup * 4 * kRows;
    piece.shift = 24 - 8 * (at % kGroup);
  });
}

// Against the exact product, one thread, int4, one plane: on a Zen 3 `many` takes 1.6 times as long
// at 17, 64 and 192 tokens (4096x4096), and `few` .37 to .71 of its time up to 16 tokens with rank
// 1 (11008x4096); with rank 4 it takes longer from 8 tokens on. On a Zen 4 with AVX2 forced `many`
// was a tenth faster with one plane, and no faster with two.
const Int8Kernels kernels = {"avx2",       false,      quantise_for_groups, quantise_v, strips,
                             panels<Avx2>, kFewAtOnce, kFewAtOnce,          false};

}  // namespace

const Int8Kernels* int8_kernels_avx2() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const Int8Kernels* int8_kernels_avx2() { return nullptr; }
}  // namespace slab
#endif
