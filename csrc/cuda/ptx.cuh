// The PTX instructions that the kernels use, one wrapper each. "PTX 9.7" and the like are sections
// of the PTX ISA 9.0 manual.
#pragma once

#include "../format.h"

namespace slab {

// ---- memory ----

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// cp.async (PTX 9.7.9.25.3) copies 16 bytes past L1; the policy decides what L2 keeps. The
// predicate is the instruction's own, so there is no branch, and one run of copies instead of
// several (ptxas guards each run with three dummy loads). kTo and kFrom bytes are added to the
// addresses.
template <int kTo, int kFrom = kTo>
__device__ __forceinline__ void copy16_if(bool yes, uint32_t to, const void* from,
                                          uint64_t policy) {
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, %3, 0;\n@yes cp.async.cg.shared.global.L2::cache_hint "
      "[%0 + %4], [%1 + %5], 16, %2;\n}" ::"r"(to),
      "l"(from), "l"(policy), "r"(int(yes)), "n"(kTo), "n"(kFrom)
      : "memory");
}
template <int kTo = 0, int kFrom = kTo>
__device__ __forceinline__ void copy16_if(uint32_t yes, uint32_t to, const void* from) {
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, %2, 0;\n@yes cp.async.cg.shared.global [%0 + %3], [%1 "
      "+ %4], 16;\n}" ::"r"(to),
      "l"(from), "r"(yes), "n"(kTo), "n"(kFrom)
      : "memory");
}
// If a bit of `bits` is set. (It is asked for here because a predicate may be gone long before the
// copy, and would then be kept in a register for each bit.)
template <int kBit, int kTo, int kFrom>
__device__ __forceinline__ void copy16_if_bit(uint32_t bits, uint32_t to, const void* from) {
  asm volatile(
      "{\n.reg .pred yes;\n.reg .b32 bit;\nand.b32 bit, %2, %5;\nsetp.ne.b32 yes, bit, 0;\n@yes "
      "cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16;\n}" ::"r"(to),
      "l"(from), "r"(bits), "n"(kTo), "n"(kFrom), "n"(1 << kBit)
      : "memory");
}
// Reads the first `bytes` of 16 and writes zeros for the rest.
__device__ __forceinline__ void copy16_zero_filled(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
template <int kTo, int kFrom = kTo>
__device__ __forceinline__ void copy16_zero_filled_if(uint32_t yes, uint32_t to, const void* from,
                                                      int bytes) {
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, %3, 0;\n@yes cp.async.cg.shared.global [%0 + %4], [%1 "
      "+ %5], 16, %2;\n}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(yes), "n"(kTo), "n"(kFrom)
      : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroups groups of this thread's copies are still on their way.
template <int kGroups>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
// For all copies of this thread, those of no group yet included.
__device__ __forceinline__ void copies_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
// Waits until at most stages - 2 groups of this thread's copies are still on their way, for 2, 3 or
// 4 stages. It takes three instructions and no branch.
__device__ __forceinline__ void copies_wait(int stages) {
  asm volatile(
      "{\n.reg .pred three, two;\nsetp.le.s32 three, %0, 3;\nsetp.le.s32 two, %0, "
      "2;\ncp.async.wait_group 2;\n"
      "@three cp.async.wait_group 1;\n@two cp.async.wait_group 0;\n}" ::"r"(stages)
      : "memory");
}

// createpolicy (PTX 9.7.9.23). Weights that no other CTA will read leave L2 first.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t weight_policy(bool read_once) {
  uint64_t first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return read_once ? first : normal;
}

// A plain load, not through the read-only cache: the kernel before may write there while this one
// begins. It stays where it is written down.
__device__ __forceinline__ uint4 load_global(const void* p) {
  uint4 r;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
// prefetch (PTX 9.7.9.16) of the line that this byte is in.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void load_shared(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ __forceinline__ void load_shared(uint32_t (&r)[2], uint32_t at) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at));
}
__device__ __forceinline__ uint32_t load_shared32(uint32_t at) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(at));
  return r;
}
__device__ __forceinline__ uint32_t load_shared16(uint32_t at) {
  uint16_t r;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(r) : "r"(at));
  return r;
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint32_t (&r)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(r[0]), "r"(r[1]) : "memory");
}
__device__ __forceinline__ void store_shared32(uint32_t at, uint32_t r) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(r) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint4& r) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r.x), "r"(r.y), "r"(r.z),
               "r"(r.w)
               : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t at, uint32_t r) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(uint16_t(r)) : "memory");
}
// ldmatrix (PTX 9.7.14.5.15) loads four 8x8 matrices of 16-bit elements; lane l names row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// ---- order ----

// bar.sync (PTX 9.7.13.1) among `threads` threads that name the same barrier.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// griddepcontrol (PTX 9.7.13.13). With programmatic dependent launch, from sm_90 on, a kernel
// starts before its predecessor ends.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- arithmetic ----

// Keeps NVVM from deriving the value again where it is used. ptxas sees through it, so a constant
// needs opaque_zero.
__device__ __forceinline__ uint32_t keep(uint32_t value) {
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
  return value;
}
__device__ __forceinline__ const uint8_t* keep(const uint8_t* p) {
  asm volatile("mov.b64 %0, %0;" : "+l"(p));
  return p;
}
// Keeps ptxas, too, from deriving the value again: it stays in a register. All lanes call this.
__device__ __forceinline__ uint32_t pin(uint32_t value) {
  return __shfl_sync(~0u, value, threadIdx.x);
}
// p + count x bytes, by one multiply-add into the register pair that a copy takes.
__device__ __forceinline__ const uint8_t* advance(const uint8_t* p, uint32_t count,
                                                  uint32_t bytes) {
  asm("mad.wide.u32 %0, %1, %2, %0;" : "+l"(p) : "r"(count), "r"(bytes));
  return p;
}
// Zero, which the compiler cannot know: the sign bit of a number that is never negative. A constant
// that it was ORed with has to live in a register.
__device__ __forceinline__ uint32_t opaque_zero(int never_negative) {
  return uint32_t(never_negative) >> 31;
}

__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t value) {
  return (word & mask) | value;
}
__device__ __forceinline__ uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t value) {
  return (word & mask) ^ value;
}

// PRMT (PTX 9.7.9.7): byte i of the result is the byte of b a, a's lowest being number 0, that
// nibble i of `choice` names, 7 at most. (__byte_perm masks a choice that only run time knows.)
__device__ __forceinline__ uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t choice) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(choice));
  return r;
}

// To the right, around the end.
template <int kBits>
__device__ __forceinline__ uint32_t rotate(uint32_t word) {
  return __funnelshift_r(word, word, kBits);
}

// Shifts up if kBits is negative.
template <int kBits>
__device__ __forceinline__ uint32_t shift_down(uint32_t word) {
  if constexpr (kBits < 0)
    return word << -kBits;
  else
    return word >> kBits;
}

__device__ __forceinline__ float widen_fp16(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ float widen_bf16(uint16_t h) {
  return __uint_as_float(uint32_t(h) << 16);
}

// The two activation types. Everything that differs between them is here.
//
// mma.sp::ordered_metadata m16n8k32 (PTX 9.7.14.6), in lane 4 g + t:
//
//   A  a0, a2 are of row g, a1, a3 of row g + 8; a0, a1 are the compressed columns 2t and 2t + 1,
//      a2, a3 the columns 2t + 8 and 2t + 9
//   B  b_i is the inputs 8i + 2t and 8i + 2t + 1 of token g
//   C  c0, c1 are of row g and tokens 2t and 2t + 1, c2, c3 the same of row g + 8
//
// The metadata of two steps fit in one register. Lanes t = 0, 1 hold the first step (selector 0),
// lanes t = 2, 3 the second (selector 1); of these the even lane holds inputs 0 to 15, the odd lane
// 16 to 31; the low half is of row g, the high half of row g + 8.
#define SLAB_MMA(TYPE)                                                                             \
  template <int kSelector>                                                                         \
  static __device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4],         \
                                                    const uint32_t (&b)[4], uint32_t metadata) {   \
    asm volatile(                                                                                  \
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
          "r"(metadata), "n"(kSelector));                                                          \
  }                                                                                                \
  /* The first product of a chain: c need not be cleared. */                                       \
  template <int kSelector>                                                                         \
  static __device__ __forceinline__ void mma_sparse_from_zero(                                     \
      float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {          \
    asm volatile(                                                                                  \
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%14, %14, %14, %14}, "      \
        "%12, %13;"                                                                                \
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
          "r"(metadata), "n"(kSelector), "f"(0.0f));                                               \
  }                                                                                                \
  static __device__ __forceinline__ void mma_dense(float (&c)[4], const uint32_t (&a)[4],          \
                                                   uint32_t b0, uint32_t b1) {                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                  \
  }

struct Fp16 {
  SLAB_MMA("f16")
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  // 0x6400 | n is 1024 + n, exactly.
  static constexpr uint32_t kByteMagic = 0x64646464u, kNibbleMagic = 0x64006400u;
  static constexpr uint32_t kOne = 0x3C003C00u;
  // Bits kIndexAt - 2 to kIndexAt + 3 are mantissa.
  static constexpr int kMantissaBits = 10, kIndexAt = 4;
  // Bytes 0 and 2 of w hold q + 128 of `even`, bytes 1 and 3 of `odd`. Each takes one PRMT and one
  // HADD2.
  static __device__ __forceinline__ void from_int8(uint32_t& even, uint32_t& odd, uint32_t w,
                                                   uint32_t magic) {
    even = add(__byte_perm(w, magic, 0x4240), 0xE480E480u);  // - 1152
    odd = add(__byte_perm(w, magic, 0x4341), 0xE480E480u);
  }
  // 4 q in a[0] and a[2], 64 q in a[1] and a[3]: the nibbles stay where they are in the mantissa,
  // which saves shifts, and the stream's scales are that much smaller.
  static __device__ __forceinline__ void from_int4(uint32_t (&a)[4], uint32_t w, uint32_t magic) {
    const uint32_t high = rotate<8>(w);
    a[0] = add(and_or(w, 0x003C003Cu, magic), 0xE420E420u);  // 1024 + 4 (q + 8) - 1056
    a[1] = add(and_or(w, 0x03C003C0u, magic), 0xE600E600u);  // 1024 + 64 (q + 8) - 1536
    a[2] = add(and_or(high, 0x003C003Cu, magic), 0xE420E420u);
    a[3] = add(and_or(high, 0x03C003C0u, magic), 0xE600E600u);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint16_t narrow(float f) {
    uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
    return r;
  }
  static __device__ __forceinline__ float widen(uint16_t h) { return widen_fp16(h); }
};

struct Bf16 {
  SLAB_MMA("bf16")
  // mul and sub of bf16x2 need sm_90, while fma exists from sm_80 on.
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return fma(a, b, 0x80008000u);
  }
  static constexpr uint32_t kByteMagic = 0x43004300u, kNibbleMagic = 0x43004300u;
  static constexpr uint32_t kOne = 0x3F803F80u;
  static constexpr int kMantissaBits = 7, kIndexAt = 2;
  // bf16 has seven mantissa bits: 0x4300 | the low seven bits is 128 + low, and the eighth bit
  // turns 256 into 128. This takes two LOP3 and one HFMA2.
  static __device__ __forceinline__ uint32_t from_bytes(uint32_t w, uint32_t magic) {
    return fma(and_xor(w, 0x00800080u, magic ^ 0x00800080u), 0xBF80BF80u,
               and_or(w, 0x007F007Fu, magic));
  }
  static __device__ __forceinline__ void from_int8(uint32_t& even, uint32_t& odd, uint32_t w,
                                                   uint32_t magic) {
    even = from_bytes(w, magic);
    odd = from_bytes(w >> 8, magic);
  }
  // 4 q: 128 + 4 (q + 8), less 160.
  static __device__ __forceinline__ uint32_t from_nibbles(uint32_t w, uint32_t magic) {
    return fma(and_or(w, 0x003C003Cu, magic), 0x3F803F80u, 0xC320C320u);
  }
  static __device__ __forceinline__ void from_int4(uint32_t (&a)[4], uint32_t w, uint32_t magic) {
    a[0] = from_nibbles(w, magic), a[1] = from_nibbles(rotate<4>(w), magic);
    a[2] = from_nibbles(rotate<8>(w), magic), a[3] = from_nibbles(rotate<12>(w), magic);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ uint16_t narrow(float f) {
    uint16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
    return r;
  }
  static __device__ __forceinline__ float widen(uint16_t h) { return widen_bf16(h); }
};
#undef SLAB_MMA

}  // namespace slab
