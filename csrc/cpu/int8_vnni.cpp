// int8 activations with AVX-512 VNNI, VBMI and BITALG: one zmm is a row block. One operand of
// vpdpbusd has no sign. In `many` that is the weights plus 128, and sums begin below 0 by what the
// 128 add (`Int8Piece::start`).
#include "../int8.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BITALG__)
#include <immintrin.h>

#include "avx512.h"
#include "int8_quad_panel.h"
#include "int8_tables.h"

namespace slab {
namespace {

struct Vnni : Avx512 {
  static constexpr int kPanelTokens = 4, kPanelBlocks = 2;
  typedef int32_t S __attribute__((vector_size(64)));
  typedef int16_t H __attribute__((vector_size(64)));

  static SLAB_INLINE bool all(S mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xFFFF; }
  static SLAB_INLINE I broadcast_int(const int32_t* p) { return (I)_mm512_set1_epi32(*p); }
  static SLAB_INLINE I to_int(F x) { return (I)_mm512_cvtps_epi32(x); }
  static SLAB_INLINE F to_float(I x) { return _mm512_cvtepi32_ps((__m512i)x); }

  template <ValueType kValues, int kPlanes, Entries kEntries>
  static SLAB_INLINE void build(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                                const H (*a)[4][1], uint8_t* panel) {
    if (w.rank == 1)
      build_quads<kValues, kPlanes, kEntries, 1>(w, t, rb, kb, a, panel);
    else
      build_quads<kValues, kPlanes, kEntries, 0>(w, t, rb, kb, a, panel);
  }
  static SLAB_INLINE I top_byte(I words, const int32_t* shift) {
    const __m512i weights = _mm512_xor_si512((__m512i)words, _mm512_set1_epi8(char(kQuadOffset)));
    const __m512i moved = _mm512_sllv_epi32(weights, _mm512_set1_epi32(*shift));
    return (I)_mm512_srai_epi32(moved, 24);
  }
  static SLAB_INLINE I dot(I acc, I weight, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, _mm512_set1_epi32(four));
  }
};

const Int8Kernels kernels = {
    "avx512_vnni", true, quantise_for_quads,  quantise_v, tables, panels<Vnni>,
    nullptr,       8,    8 * (1 + kManyRank), true};

}  // namespace

const Int8Kernels* int8_kernels_vnni() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const Int8Kernels* int8_kernels_vnni() { return nullptr; }
}  // namespace slab
#endif
