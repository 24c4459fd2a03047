// The matrix products of a warpgroup: wgmma.mma_async (PTX 9.7.15.5) and its sparse form (PTX
// 9.7.15.6) with A in registers, for 64, 128 and 256 tokens.
//
//   D[64 rows][tokens] += A[64][16] B[16][tokens]     dense
//   D[64 rows][tokens] += A[64][32] B[32][tokens]     sparse: two of four inputs of A are stored
//
// Warp w of the warpgroup has rows 16 w to 16 w + 15. In lane 4 g + t, a0 to a3 and the metadata
// are those of m16n8k16 and of mma.sp m16n8k32 (ptx.cuh); c[4 j + i] is row g + 8 (i / 2) and token
// 8 j + 2 t + i % 2. B lies in shared memory, token by token; its descriptor is the same in all
// threads.
#pragma once

#include "ptx.cuh"

namespace slab {

// The descriptor of B whose tokens have 128 bytes, 64 inputs, each, with the 128-byte swizzle. Its
// low half: the address / 16 of the first token's first input, to which 2 is added for every 16
// inputs further on. Its high half: 1024 / 16 from one eight of tokens to the next, and the
// swizzle's number.
__device__ __forceinline__ uint32_t tokens_descriptor(uint32_t at) { return at >> 4 | 1u << 16; }
__device__ __forceinline__ uint64_t whole_descriptor(uint32_t low) {
  return uint64_t(0x40000040u) << 32 | low;
}

// Operands "%t0, %t1, ... %t9, ".
#define SLAB_TEN(t)                                                                                \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
// The sums of 64, 128 and 256 tokens: 32, 64 and 128 operands.
#define SLAB_THIRTY SLAB_TEN() SLAB_TEN(1) SLAB_TEN(2)
#define SLAB_SUMS_64 "{" SLAB_THIRTY "%30, %31}, "
#define SLAB_SIXTY SLAB_THIRTY SLAB_TEN(3) SLAB_TEN(4) SLAB_TEN(5)
#define SLAB_SUMS_128 "{" SLAB_SIXTY "%60, %61, %62, %63}, "
#define SLAB_HUNDRED_TWENTY \
  SLAB_SIXTY SLAB_TEN(6) SLAB_TEN(7) SLAB_TEN(8) SLAB_TEN(9) SLAB_TEN(10) SLAB_TEN(11)
#define SLAB_SUMS_256 "{" SLAB_HUNDRED_TWENTY "%120, %121, %122, %123, %124, %125, %126, %127}, "
// A and B after them, and the metadata with its selector.
#define SLAB_AB_64 "{%32, %33, %34, %35}, %36"
#define SLAB_AB_128 "{%64, %65, %66, %67}, %68"
#define SLAB_AB_256 "{%128, %129, %130, %131}, %132"
#define SLAB_METADATA_64 ", %37, %38"
#define SLAB_METADATA_128 ", %69, %70"
#define SLAB_METADATA_256 ", %133, %134"

#define SLAB_C8(i)                                                                            \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define SLAB_C32(i) SLAB_C8(i), SLAB_C8(i + 8), SLAB_C8(i + 16), SLAB_C8(i + 24)
#define SLAB_C_64 SLAB_C32(0)
#define SLAB_C_128 SLAB_C32(0), SLAB_C32(32)
#define SLAB_C_256 SLAB_C_128, SLAB_C32(64), SLAB_C32(96)
#define SLAB_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// The sums are added to (1), nothing is negated (1, 1), B's inputs lie side by side (0).
#define SLAB_PRODUCT(T, TYPE, N)                                                              \
  static __device__ __forceinline__ void dense(T, float (&c)[N / 2], const uint32_t (&a)[4],  \
                                               uint32_t b) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE              \
                 " " SLAB_SUMS_##N SLAB_AB_##N ", 1, 1, 1, 0;"                                \
                 : SLAB_C_##N                                                                 \
                 : SLAB_A, "l"(whole_descriptor(b)));                                         \
  }                                                                                           \
  template <int kSelector>                                                                    \
  static __device__ __forceinline__ void sparse(T, float (&c)[N / 2], const uint32_t (&a)[4], \
                                                uint32_t b, uint32_t metadata) {              \
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE           \
                 " " SLAB_SUMS_##N SLAB_AB_##N SLAB_METADATA_##N ", 1, 1, 1, 0;"              \
                 : SLAB_C_##N                                                                 \
                 : SLAB_A, "l"(whole_descriptor(b)), "r"(metadata), "n"(kSelector));          \
  }

// b is tokens_descriptor()'s.
// dense(T(), c, a, b) and sparse<selector>(T(), c, a, b, metadata), T being Fp16 or Bf16: issued,
// not waited for.
template <int kTokens>
struct Products;
#define SLAB_PRODUCTS(N)          \
  template <>                     \
  struct Products<N> {            \
    SLAB_PRODUCT(Fp16, "f16", N)  \
    SLAB_PRODUCT(Bf16, "bf16", N) \
  };
SLAB_PRODUCTS(64)
SLAB_PRODUCTS(128)
SLAB_PRODUCTS(256)

#undef SLAB_TEN
#undef SLAB_THIRTY
#undef SLAB_SUMS_64
#undef SLAB_SIXTY
#undef SLAB_SUMS_128
#undef SLAB_HUNDRED_TWENTY
#undef SLAB_SUMS_256
#undef SLAB_AB_64
#undef SLAB_AB_128
#undef SLAB_AB_256
#undef SLAB_METADATA_64
#undef SLAB_METADATA_128
#undef SLAB_METADATA_256
#undef SLAB_C8
#undef SLAB_C32
#undef SLAB_C_64
#undef SLAB_C_128
#undef SLAB_C_256
#undef SLAB_A
#undef SLAB_PRODUCT
#undef SLAB_PRODUCTS

}  // namespace slab
