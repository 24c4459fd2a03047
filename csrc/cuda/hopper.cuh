// The PTX instructions of Hopper alone (sm_90a), one wrapper each: barriers in shared memory, bulk
// and tensor copies, clusters, warpgroups. "PTX 9.7" and the like are sections of the PTX ISA 9.0
// manual. The matrix products are in wgmma.cuh.
#pragma once

#include "prefill.h"
#include "ptx.cuh"

namespace slab {

// ---- mbarrier (PTX 9.7.13.15): addresses are those of shared memory ----

// A phase ends when `count` threads have arrived and all bytes have come that these announced.
__device__ __forceinline__ void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// After all inits, before any other thread or copy uses them.
__device__ __forceinline__ void mbarriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Arrives at another CTA's barrier, an address of `in_cta`. Without .release.cluster, which would
// cost a MEMBAR each time: what is given back was only read, by products that are over.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is over. The phase before the first has parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\nbra again;\ndone:\n}" ::"r"(at),
      "r"(parity)
      : "memory");
}

// ---- copies into shared memory that an mbarrier counts ----

// cp.async.bulk (PTX 9.7.9.25.4.1): addresses and size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(mbarrier)
      : "memory");
}
// cp.async.bulk.tensor (PTX 9.7.9.27.1.2): the box of a matrix that begins at (column, row).
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, int column, int row,
                                         uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(mbarrier)
      : "memory");
}
// To the same address of both CTAs of a pair, and counted by the barrier of each.
__device__ __forceinline__ void copy_box_to_pair(uint32_t to, const TensorMap* map, int column,
                                                 int row, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(mbarrier), "h"(uint16_t(3))
      : "memory");
}
// fence.proxy.async (PTX 9.7.13.4): what this thread wrote is seen by wgmma and copies that are
// issued after the next barrier.
__device__ __forceinline__ void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- clusters ----

// mapa (PTX 9.7.9): an address of shared memory as that of another CTA of the cluster.
__device__ __forceinline__ uint32_t in_cta(uint32_t at, int rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
  return r;
}
// barrier.cluster (PTX 9.7.13.3) of all threads of the cluster that have not exited.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// ---- threads ----

// threadIdx.x, read anew: the compiler would keep what it knows in a register.
__device__ __forceinline__ int thread_index() {
  int r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}

// ---- warpgroups: four warps from a multiple of four on ----

// setmaxnreg (PTX 9.7.19.5): registers of each thread from here on.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// wgmma.fence, commit_group, wait_group (PTX 9.7.15.7). The fence stands between what the warpgroup
// wrote to registers and the products that read them.
__device__ __forceinline__ void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kGroups groups of this warpgroup's products are still on their way.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// stmatrix (PTX 9.7.14.5.16) stores four 8x8 matrices of 16-bit elements, transposed: lane l names
// column l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t at, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// The neighbour's value: lanes 2 i and 2 i + 1 exchange.
__device__ __forceinline__ uint32_t exchange(uint32_t value) {
  uint32_t r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, 1, 31, -1;" : "=r"(r) : "r"(value));
  return r;
}

}  // namespace slab
