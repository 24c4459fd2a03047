// Plain C++ with the compiler's vector extension, for any architecture. Lane n is an output row, as
// everywhere.
#include "kernel.h"

namespace slab {
namespace {

struct Scalar {
  static constexpr const char* kName = "scalar";
  static constexpr int kLanes = 8, kLookupBlocks = 1, kPairBlocks = 1, kPairRank = 4,
                       kLookupTokens = 4, kRank0LookupTokens = 4, kTokens = 4;
  static constexpr int kUnrollRank = -1;
  typedef float F __attribute__((vector_size(32)));
  typedef uint32_t I __attribute__((vector_size(32)));
  typedef int32_t S __attribute__((vector_size(32)));

  static SLAB_INLINE F zero() { return F{}; }
  static SLAB_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static SLAB_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  static SLAB_INLINE F broadcast(const float* p) { return *p - F{}; }
  static SLAB_INLINE F fma(F a, F b, F c) { return a * b + c; }
  // Transposes 8 x 8 numbers, whose rows are so far apart.
  static SLAB_INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) to[j * to_stride + i] = from[i * stride + j];
  }
  static SLAB_INLINE I load_words(const uint8_t* p) {
    I v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static SLAB_INLINE F select(S mask, F yes, F no) {
    return (F)((mask & (S)yes) | (~mask & (S)no));
  }

  template <ValueType kValues>
  static SLAB_INLINE F load_values(const uint8_t* p) {
    I raw;
    if constexpr (kValues == kInt8) {
      int8_t q[kLanes];
      std::memcpy(q, p, sizeof(q));
      F v;
      for (int n = 0; n < kLanes; ++n) v[n] = float(q[n]);
      return v;
    } else {
      uint16_t h[kLanes];
      std::memcpy(h, p, sizeof(h));
      for (int n = 0; n < kLanes; ++n) raw[n] = h[n];
      if constexpr (kValues == kBf16) return (F)(raw << 16);
      return from_fp16(raw);
    }
  }
  // This is exact, for subnormals too, and uses no subnormal arithmetic, which the program may
  // flush.
  static SLAB_INLINE F from_fp16(I h) {
    const I w = (h & 0x7FFFu) << 16;
    const F normal = (F)((w >> 3) + (0x70u << 23));
    const F huge = (F)((w >> 3) | 0x7F800000u);  // infinities and NaN
    const F small = (F)((w >> 16) | (126u << 23)) - 0.5f;
    const F size = select((S)(w < 0x04000000u), small, select((S)(w >= 0x7C000000u), huge, normal));
    return (F)((I)size | (h & 0x8000u) << 16);
  }
  static SLAB_INLINE F from_int4(I word, int shift) {
    return __builtin_convertvector((S)(word << (28 - shift)) >> 28, F);
  }

  struct Table {
    float at[16];
  };
  struct Kept {
    Table first, second;
  };
  static SLAB_INLINE Kept kept_table(const float* x) {
    return {{{x[0], x[0], x[0], x[1], x[1], x[2], 0, 0, x[0], x[0], x[0], x[1], x[1], x[2], 0, 0}},
            {{x[1], x[2], x[3], x[2], x[3], x[3], 0, 0, x[1], x[2], x[3], x[2], x[3], x[3], 0, 0}}};
  }
  static SLAB_INLINE F answer(const Table& t, I code) {
    F v;
    for (int n = 0; n < kLanes; ++n) v[n] = t.at[code[n] & 15u];
    return v;
  }
  static SLAB_INLINE F first(const Kept& t, I code) { return answer(t.first, code); }
  static SLAB_INLINE F second(const Kept& t, I code) { return answer(t.second, code); }

  using Pruned = Table;
  static SLAB_INLINE Pruned pruned_table(const float* x) {
    return {{x[3] + x[2], x[3] + x[1], x[2] + x[1], x[3] + x[0], x[2] + x[0], x[1] + x[0], 0, 0,
             x[3] - x[2], x[3] - x[1], x[2] - x[1], x[3] - x[0], x[2] - x[0], x[1] - x[0], 0, 0}};
  }
  static SLAB_INLINE F pruned(const Pruned& t, I code, I flip) {
    return signed_by(answer(t, code), flip);
  }
  static SLAB_INLINE F signed_by(F v, I bits) { return (F)((I)v ^ (bits & 0x80000000u)); }

  // For several planes the two pruned positions are apart, the first one negated where r is set.
  static constexpr bool kSignedTable = true;
  using Apart = Kept;
  static SLAB_INLINE Apart apart_table(const float* x) {
    return {{{x[2], x[1], x[1], x[0], x[0], x[0], 0, 0, -x[2], -x[1], -x[1], -x[0], -x[0], -x[0], 0,
              0}},
            {{x[3], x[3], x[2], x[3], x[2], x[1], 0, 0, x[3], x[3], x[2], x[3], x[2], x[1], 0, 0}}};
  }
  // The magnitudes of the two pruned positions' factors, from the fields of `levels`.
  struct Pair {
    F first, second;
  };
  template <int kPlanes>
  static SLAB_INLINE Pair sizes(I level) {
    constexpr uint32_t mask = (1u << (kPlanes - 1)) - 1u;
    constexpr float largest = kPlanes == 2 ? 1.5f : 1.75f, step = kPlanes == 2 ? 1.0f : 0.5f;
    return {largest - step * __builtin_convertvector((S)(level & mask), F),
            largest - step * __builtin_convertvector((S)(level >> (kPlanes - 1) & mask), F)};
  }

  static constexpr bool kMoved = false;
  static SLAB_INLINE I places(I code) {
    I at;
    for (int n = 0; n < kLanes; ++n) at[n] = kPlaceWords[code[n] & 7u];
    return at;
  }
  static SLAB_INLINE F choose(I bits, int bit, F yes, F no) {
    return select((S)(bits << (31 - bit)) >> 31, yes, no);
  }

  static SLAB_INLINE void store_bf16(uint16_t* p, F v) {
    const I bits = (I)v;
    const I round = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    const I out = (I)select((S)(v != v), (F)quiet, (F)round);
    for (int n = 0; n < kLanes; ++n) p[n] = uint16_t(out[n]);
  }
  static SLAB_INLINE void store_fp16(uint16_t* p, F v) {
    const I bits = (I)v, size = bits & 0x7FFFFFFFu;
    // Adding 2^(e + 13) in fp32 rounds to 10 bits, to nearest even. Below the normal range the
    // addend is fixed.
    const I normal = (size + 0xC8000FFFu + ((size >> 13) & 1u)) >> 13;
    const I small = (I)((F)size + 0.5f) - (126u << 23);
    I out = (I)select((S)(size < 0x38800000u), (F)small, (F)normal);
    out = (I)select((S)(size >= 0x47800000u), (F)(I)(I{} + 0x7C00u), (F)out);
    out = (I)select((S)(size > 0x7F800000u), (F)(I)(I{} + 0x7E00u), (F)out);
    out |= (bits >> 16) & 0x8000u;
    for (int n = 0; n < kLanes; ++n) p[n] = uint16_t(out[n]);
  }
};

const CpuKernels kernels = kernel_table<Scalar>();

}  // namespace

const CpuKernels* cpu_kernels_scalar() { return &kernels; }

}  // namespace slab
