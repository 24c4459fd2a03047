// Device code that only benchmarks/on_gpu runs, compiled by NVRTC beside the headers of csrc/cuda:
// the smallest things that nothing but hardware can refute, and loops whose clocks tell what the
// cost model assumes. It is no unit of the package, so no image of it is built or shipped.
#include "hopper.cuh"
#include "wgmma.cuh"

namespace slab {

struct HardwareParams {
  TensorMap map;
  const uint32_t* a;         // [steps][128 threads][4], A of one product each
  const uint32_t* metadata;  // [128 threads]: of two sparse products, with selectors 0 and 1
  const uint8_t* from;       // what is copied or looked up
  float* sums;               // [128 threads][32]
  uint8_t* bytes;            // what lies in shared memory afterwards, one CTA behind the other
  uint32_t* clocks;          // [warps]: when each began and ended
  int column, row;           // where a box begins
  int loads, copies;         // of a warp, and of the thread that copies
};

constexpr int kBoxTokens = 64, kBoxBytes = kBoxTokens * 128;
constexpr int kCopyBytes = 16384, kCopyStages = 4;

// Shared memory from a multiple of 1024 on, as the swizzle wants it.
__device__ __forceinline__ uint32_t aligned_shared() {
  extern __shared__ uint8_t shared[];
  return (shared_address(shared) + 1023) / 1024 * 1024;
}
__device__ __forceinline__ uint32_t clock() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

// Loads that are made as often as they are written down.
__device__ __forceinline__ uint32_t load_again(uint32_t at) {
  uint32_t r;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(r) : "r"(at));
  return r;
}
__device__ __forceinline__ void load_again(uint32_t (&r)[2], uint32_t at) {
  asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at));
}
__device__ __forceinline__ void load_again(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

// ---- one product of a warpgroup ----

// B [64 tokens][64 inputs] into shared memory by ordinary stores, with the 128-byte swizzle.
__device__ __forceinline__ void store_tokens(uint32_t to, const uint8_t* from) {
  for (int piece = threadIdx.x; piece < kBoxBytes / 16; piece += blockDim.x) {
    const int token = piece / 8, at = piece % 8 ^ token % 8;
    store_shared(to + 128 * token + 16 * at, load_global(from + 16 * piece));
  }
  publish_to_async_proxy();
  __syncthreads();
}

template <class T, bool kSparse>
__device__ __forceinline__ void product(const HardwareParams& params) {
  constexpr int kProducts = kSparse ? 2 : 4;  // of 32 or 16 inputs
  const uint32_t tokens = aligned_shared();
  store_tokens(tokens, params.from);
  uint32_t a[kProducts][4];
#pragma unroll
  for (int step = 0; step < kProducts; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[step][i] = params.a[(128 * step + threadIdx.x) * 4 + i];
  float sums[kBoxTokens / 2];
#pragma unroll
  for (int i = 0; i < kBoxTokens / 2; ++i) sums[i] = 0.0f;
  const uint64_t b = tokens_descriptor(tokens);
  using P = Products<kBoxTokens>;
  const uint32_t metadata = kSparse ? params.metadata[threadIdx.x] : 0;
  // All of this is in registers before the fence, whatever the compiler thinks of its order.
#pragma unroll
  for (int i = 0; i < kBoxTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#pragma unroll
  for (int step = 0; step < kProducts; ++step)
    asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3]));
  products_fence();
  if constexpr (kSparse) {
    P::sparse<0>(T(), sums, a[0], b, metadata);
    P::sparse<1>(T(), sums, a[1], b + 4, metadata);
  } else {
#pragma unroll
    for (int step = 0; step < kProducts; ++step) P::dense(T(), sums, a[step], b + 2 * step);
  }
  products_commit();
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < kBoxTokens / 2; ++i) params.sums[kBoxTokens / 2 * threadIdx.x + i] = sums[i];
}

// ---- copies of boxes ----

// All of the box's bytes in shared memory, as they lie there.
__device__ __forceinline__ void show_box(uint8_t* to, uint32_t box) {
  for (int piece = threadIdx.x; piece < kBoxBytes / 16; piece += blockDim.x) {
    uint32_t r[4];
    load_shared(r, box + 16 * piece);
    reinterpret_cast<uint4*>(to)[piece] = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

__device__ __forceinline__ void box(const HardwareParams& params) {
  const uint32_t to = aligned_shared(), barrier = to + kBoxBytes;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarriers_are_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(barrier, kBoxBytes);
    copy_box(to, &params.map, params.column, params.row, barrier);
  }
  mbarrier_wait(barrier, 0);
  show_box(params.bytes, to);
}

// Each CTA of a pair fetches half of the tokens for both.
__device__ __forceinline__ void box_of_pair(const HardwareParams& params) {
  const int rank = blockIdx.x;
  const uint32_t to = aligned_shared(), barrier = to + kBoxBytes;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarriers_are_ready();
  }
  cluster_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(barrier, kBoxBytes);
    copy_box_to_pair(to + rank * (kBoxBytes / 2), &params.map, params.column,
                     params.row + rank * (kBoxTokens / 2), barrier);
  }
  mbarrier_wait(barrier, 0);
  show_box(params.bytes + rank * kBoxBytes, to);
  cluster_barrier();
}

// ---- clocks ----

// Where a warp writes that it began and ended, and a value that keeps its loop from being removed.
__device__ __forceinline__ void tell(const HardwareParams& params, uint32_t begin, uint32_t value) {
  const uint32_t end = clock();
  if (threadIdx.x % 32 == 0) {
    params.clocks[threadIdx.x / 32 * 2] = begin;
    params.clocks[threadIdx.x / 32 * 2 + 1] = end;
  }
  if (value == 0x9E3779B9u) params.clocks[0] = 0;
}

// All warps but the last read 512 bytes at a time, which takes the whole port of shared memory.
// Meanwhile a thread of the last one copies to other places.
__device__ __forceinline__ void port(const HardwareParams& params) {
  const uint32_t ring = aligned_shared(), read = ring + kCopyStages * kCopyBytes;
  const uint32_t barriers = read + 512;
  const int reading = blockDim.x - 32, lane = threadIdx.x % 32;
  if (threadIdx.x < 32) store_shared(read + 16 * lane, make_uint4(lane, lane, lane, lane));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kCopyStages; ++stage) mbarrier_init(barriers + 8 * stage, 1);
    mbarriers_are_ready();
  }
  __syncthreads();
  const uint32_t begin = clock();
  uint32_t value = 0;
  if (threadIdx.x < reading) {
#pragma unroll 1
    for (int i = 0; i < params.loads; i += 8)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t r[4];
        load_again(r, read + 16 * lane);
        value += r[0] ^ r[1] ^ r[2] ^ r[3];
      }
  } else if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < params.copies + kCopyStages; ++i) {
      const uint32_t stage = i % kCopyStages, barrier = barriers + 8 * stage;
      if (i >= kCopyStages) mbarrier_wait(barrier, (i / kCopyStages - 1) % 2);
      if (i >= params.copies) continue;
      mbarrier_arrive_expecting(barrier, kCopyBytes);
      copy_bulk(ring + stage * kCopyBytes, params.from + i % 16 * kCopyBytes, kCopyBytes, barrier);
    }
  }
  __syncwarp();
  tell(params, begin, value);
}

// Look-ups of 8 or 4 bytes at the places that `from` says for each lane, in a table of 256 bytes.
template <bool kPairs>
__device__ __forceinline__ void look_up(const HardwareParams& params) {
  const uint32_t table = aligned_shared();
  if (threadIdx.x < 64) store_shared16(table + 4 * threadIdx.x, threadIdx.x);
  if (threadIdx.x < 64) store_shared16(table + 4 * threadIdx.x + 2, threadIdx.x);
  const uint32_t at = table + reinterpret_cast<const uint32_t*>(params.from)[threadIdx.x % 32];
  __syncthreads();
  const uint32_t begin = clock();
  uint32_t value = 0;
#pragma unroll 1
  for (int i = 0; i < params.loads; i += 8)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (kPairs) {
        uint32_t r[2];
        load_again(r, at);
        value += r[0] ^ r[1];
      } else {
        value += load_again(at);
      }
    }
  tell(params, begin, value);
}

// The instructions by which the kernel that rebuilds a weight makes pairs of it (7.3): four
// look-ups that do not depend on each other, with what follows each of them.
__device__ __forceinline__ void issue(const HardwareParams& params) {
  const uint32_t table = aligned_shared(), lane = threadIdx.x % 32;
  if (threadIdx.x < 64) store_shared16(table + 2 * threadIdx.x, 0x5410 + threadIdx.x % 4);
  __syncthreads();
  uint32_t word = lane * 0x9E3779B9u, kept = word ^ 0x3C003C00u, value = 0;
  const uint32_t u = 0x3C003C00u + lane, odd = lane % 2;
  const uint32_t begin = clock();
#pragma unroll 1
  for (int i = 0; i < params.loads; i += 4) {
    word = word * 5 + 1, kept += 0x00010001u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t two = __funnelshift_r(word, word, 4 * j + 1) & 0x00780078u;
      uint32_t entry[2];
      load_shared(entry, table + (two & 0x78));
      const uint32_t pair = choose_bytes(word, kept, entry[0] >> 16);
      const uint32_t pruned = and_xor(word << j, 0x80008000u, Fp16::multiply(pair, u));
      const uint32_t own = choose_bytes(kept, pruned, entry[0]);
      const uint32_t got = exchange(choose_bytes(kept, pruned, entry[1]));
      value += odd ? got : own;
    }
  }
  tell(params, begin, value);
}

#define SLAB_HARDWARE(name, bounds, body) \
  extern "C" __global__ void bounds name(const __grid_constant__ HardwareParams params) { body; }

SLAB_HARDWARE(dense_product_fp16, __launch_bounds__(128), (product<Fp16, false>(params)))
SLAB_HARDWARE(dense_product_bf16, __launch_bounds__(128), (product<Bf16, false>(params)))
SLAB_HARDWARE(sparse_product_fp16, __launch_bounds__(128), (product<Fp16, true>(params)))
SLAB_HARDWARE(sparse_product_bf16, __launch_bounds__(128), (product<Bf16, true>(params)))
SLAB_HARDWARE(box_copy, __launch_bounds__(128), box(params))
SLAB_HARDWARE(box_copy_of_pair, __cluster_dims__(2, 1, 1) __launch_bounds__(128),
              box_of_pair(params))
SLAB_HARDWARE(port_clocks, __launch_bounds__(512), port(params))
SLAB_HARDWARE(look_up_64_clocks, __launch_bounds__(512), look_up<true>(params))
SLAB_HARDWARE(look_up_32_clocks, __launch_bounds__(512), look_up<false>(params))
SLAB_HARDWARE(issue_clocks, __launch_bounds__(512), issue(params))

}  // namespace slab
