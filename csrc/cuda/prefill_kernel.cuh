// The fused linear for many tokens on Hopper: y = x W^T (+ z P^T) (+ bias), W read as the decode
// kernels read it.
//
// A CTA stays on its multiprocessor and walks its tiles. One warpgroup fetches weights and
// activations into two rings of shared memory, the others multiply; barriers in shared memory hand
// the stages over. The rings run on from tile to tile.
#pragma once

#include "prefill_consumer.cuh"
#include "prefill_producer.cuh"

namespace slab {

// All barriers of both rings. Weights are given back by every warp that multiplies, activations by
// those of both CTAs of a pair.
template <class Traits>
__device__ __forceinline__ void begin_barriers(uint32_t base) {
#pragma unroll 1
  for (int i = 0; i < kPrefillStages; ++i) {
    const uint32_t weights = base + Traits::kFullWeightsAt + 8 * i;
    const uint32_t tokens = base + Traits::kFullTokensAt + 8 * i;
    mbarrier_init(weights, 1);
    mbarrier_init(weights + Traits::kEmpty, Traits::kConsumerWarps);
    mbarrier_init(tokens, 1);
    mbarrier_init(tokens + Traits::kEmpty, Traits::kPair * Traits::kConsumerWarps);
    if constexpr (Traits::kKind == kPrefillBoth) mbarrier_init(tokens + Traits::kProducts, 64);
  }
  mbarriers_are_ready();
  publish_to_async_proxy();
}

template <class Traits>
__device__ __forceinline__ void prefill(const PrefillParams& params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  let_successor_start();
  const PrefillShared<Traits> shared(params, shared_memory);
  // Only a shuffle tells the compiler that a warp's number is the same for all its lanes.
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int cluster = blockIdx.x / Traits::kPair, rank_in_pair = blockIdx.x % Traits::kPair;
  if (threadIdx.x == 0) begin_barriers<Traits>(shared.base);
  if (Traits::kKind == kPrefillRebuild && threadIdx.x < 16)
    fill_selectors(shared.base + Traits::kTableAt, threadIdx.x);
  if constexpr (Traits::kPair == 1)
    __syncthreads();
  else
    cluster_barrier();
  if (warp >= Traits::kConsumerWarps) {
    produce(params, shared, cluster, rank_in_pair, warp - Traits::kConsumerWarps, lane);
    return;
  }
  take_registers<Traits::kConsumerRegisters>();
  PrefillConsumer<Traits>(params, shared, warp, lane).multiply(cluster, rank_in_pair);
  // Nobody leaves while the other CTA may still arrive here or write here.
  if constexpr (Traits::kPair == 2) cluster_barrier();
}

}  // namespace slab
