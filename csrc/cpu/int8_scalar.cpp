// int8 activations in plain C++ with the compiler's vector extension, for any architecture.
#include "int8_panel.h"
#include "int8_tokens.h"

namespace slab {
namespace {

struct Scalar {
  static constexpr int kLanes = 8, kPanelTokens = 4, kPanelBlocks = 1;
  static constexpr uint32_t kFlip = 0;
  static constexpr bool kQuads = false;
  typedef float F __attribute__((vector_size(32)));
  typedef uint32_t I __attribute__((vector_size(32)));
  typedef int32_t S __attribute__((vector_size(32)));
  typedef int16_t H __attribute__((vector_size(32)));

  static SLAB_INLINE F zero() { return F{}; }
  static SLAB_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static SLAB_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  static SLAB_INLINE F broadcast(const float* p) { return *p - F{}; }
  static SLAB_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static SLAB_INLINE I load_words(const uint8_t* p) {
    I v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static SLAB_INLINE void store_words(uint8_t* p, I v) { std::memcpy(p, &v, sizeof(v)); }
  static SLAB_INLINE I load_bytes(const uint8_t* p) {
    I v;
    for (int n = 0; n < kLanes; ++n) v[n] = p[n];
    return v;
  }
  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    static_assert(kValues == kBf16);
    uint16_t h[kLanes];
    std::memcpy(h, p, sizeof(h));
    I v;
    for (int n = 0; n < kLanes; ++n) v[n] = uint32_t(h[n]) << 16;
    return (F)v;
  }
  static SLAB_INLINE bool all(S mask) {
    int32_t every = -1;
    for (int n = 0; n < kLanes; ++n) every &= mask[n];
    return every != 0;
  }
  static SLAB_INLINE I to_int(F x) { return (I)(x + 12582912.0f) - 0x4B400000u; }
  static SLAB_INLINE F to_float(I x) { return __builtin_convertvector((S)x, F); }

  static SLAB_INLINE I lookup(const uint32_t* table, I code) {
    I v;
    for (int n = 0; n < kLanes; ++n) v[n] = table[code[n] & 7u];
    return v;
  }
  static SLAB_INLINE I place(I bytes, I order) {
    I v{};
    for (int k = 0; k < 32; k += 8) {
      const I from = order >> k & 0xFFu;
      v |= ((bytes >> (from & 1u) * 8u & 0xFFu) & (I)(from < 2u)) << k;
    }
    return v;
  }
  static SLAB_INLINE I splat(const int32_t* p) { return I{} + uint32_t(*p); }
  static SLAB_INLINE H pair(const int16_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return (H)(I{} + word);
  }
  static SLAB_INLINE H mulhrs(H a, H b) {
    const S low = ((S)((I)a << 16) >> 16) * ((S)((I)b << 16) >> 16);
    const S high = ((S)a >> 16) * ((S)b >> 16);
    return (H)(((I)((low + 0x4000) >> 15) & 0xFFFFu) | (I)((high + 0x4000) >> 15) << 16);
  }
  static SLAB_INLINE I sign(I m, I l) {
    typedef int8_t B __attribute__((vector_size(32)));
    const B negative = (B)l < 0, some = (B)l != 0;
    return (I)((((B)m ^ negative) - negative) & some);
  }
  static SLAB_INLINE I dot(I acc, I weight, const int8_t* x) {
    S sum = (S)acc;
    for (int k = 0; k < 4; ++k) sum += ((S)(weight << (24 - 8 * k)) >> 24) * int32_t(x[k]);
    return (I)sum;
  }
};

constexpr int kNever = 1 << 30;

const Int8Kernels kernels = {"scalar",
                             false,
                             quantise,
                             quantise_v,
                             panel_values<Scalar, false>,
                             panel_values<Scalar, true>,
                             kNever,
                             kNever};

}  // namespace

const Int8Kernels* int8_kernels_scalar() { return &kernels; }

}  // namespace slab
