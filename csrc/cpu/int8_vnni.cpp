// int8 activations with AVX-512 VNNI, VBMI and BITALG: one zmm is a row block. vpdpbusd takes one
// operand without a sign: the weight plus 128 in a panel, x plus 128 in a table.
#include "../int8.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BITALG__)
#include <immintrin.h>

#include "int8_panel.h"
#include "int8_tables.h"
#include "int8_tokens.h"

namespace slab {
namespace {

struct Vnni {
  static constexpr int kLanes = 16, kPanelTokens = 12, kPanelBlocks = 2;
  static constexpr uint32_t kFlip = 0x80808080u;
  using F = __m512;
  typedef uint32_t I __attribute__((vector_size(64)));
  typedef int32_t S __attribute__((vector_size(64)));
  typedef int16_t H __attribute__((vector_size(64)));

  static SLAB_INLINE F zero() { return _mm512_setzero_ps(); }
  static SLAB_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static SLAB_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static SLAB_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static SLAB_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static SLAB_INLINE I load_words(const uint8_t* p) { return (I)_mm512_loadu_si512(p); }
  static SLAB_INLINE void store_words(uint8_t* p, I v) { _mm512_storeu_si512(p, (__m512i)v); }
  static SLAB_INLINE I load_bytes(const uint8_t* p) {
    return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  }
  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    static_assert(kValues == kBf16);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static SLAB_INLINE bool all(S mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xFFFF; }
  static SLAB_INLINE I to_int(F x) { return (I)_mm512_cvtps_epi32(x); }
  static SLAB_INLINE F to_float(I x) { return _mm512_cvtepi32_ps((__m512i)x); }

  static SLAB_INLINE I lookup(const uint32_t* table, I code) {
    return (I)_mm512_permutexvar_epi32((__m512i)code, _mm512_load_si512(table));
  }
  static SLAB_INLINE I place(I bytes, I order) {
    const __m512i lanes =
        _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    return (I)_mm512_shuffle_epi8((__m512i)bytes, _mm512_or_si512((__m512i)order, lanes));
  }
  static SLAB_INLINE H pair(const int16_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return (H)_mm512_set1_epi32(word);
  }
  static SLAB_INLINE H mulhrs(H a, H b) { return (H)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
  static SLAB_INLINE I sign(I m, I l) {
    const __m512i size = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask((__m512i)l, (__m512i)l),
                                               (__m512i)m);
    return (I)_mm512_mask_sub_epi8(size, _mm512_movepi8_mask((__m512i)l), _mm512_setzero_si512(),
                                   size);
  }
  static SLAB_INLINE I dot(I acc, I weight, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, _mm512_set1_epi32(four));
  }
};

const Int8Kernels kernels = {"avx512_vnni",
                             true,
                             quantise_with_tables,
                             quantise_v,
                             table_values,
                             panel_values<Vnni, true>,
                             16};

}  // namespace

const Int8Kernels* int8_kernels_vnni() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const Int8Kernels* int8_kernels_vnni() { return nullptr; }
}  // namespace slab
#endif
