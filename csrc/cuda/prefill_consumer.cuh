// The warpgroups that multiply: 64 rows each for all tokens of the tile.
//
// In each step of 32 inputs a warpgroup makes its operands in registers and issues the products
// with activations in shared memory; at most those of the step before it are still on their way.
// What they have read is given back to the thread that fetches: activations when the products are
// over that read them, weights when the last step's operands are made.
#pragma once

#include "prefill_end.cuh"
#include "prefill_rebuild.cuh"
#include "prefill_sparse.cuh"

namespace slab {

template <class Traits, int kKind = Traits::kKind>
struct PrefillOperands {
  using Type = SparseOperands<Traits>;
};
template <class Traits>
struct PrefillOperands<Traits, kPrefillRebuild> {
  using Type = RebuildOperands<Traits>;
};

template <class Traits>
struct PrefillConsumer {
  using T = typename Traits::Activation;
  using Operands = typename PrefillOperands<Traits>::Type;

  const PrefillParams& params;
  const PrefillShared<Traits>& shared;
  float sums[Traits::kTokens / 2];  // c of wgmma.cuh
  Operands operands;
  PrefillRing weights, tokens;  // tokens.at is a descriptor
  uint32_t last_tokens;         // the barrier of the stage whose products may be on their way, or 0

  __device__ __forceinline__ PrefillConsumer(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int warp,
                                             int lane)
      : params(params),
        shared(shared),
        operands(params, shared, warp, lane),
        weights(shared.weight_ring(0)),
        tokens(shared.token_ring(0)) {
    tokens.at = tokens_descriptor(tokens.at);
  }
  __device__ __forceinline__ void next_tokens() {
    tokens.advance(Traits::kTokenBytes / 16, params.token_stages);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Traits::kTokens / 2; ++i) sums[i] = 0.0f;
  }

  __device__ __forceinline__ void wait_for_tokens() const {
    mbarrier_wait(tokens.full, tokens.parity);
    if constexpr (Traits::kKind == kPrefillBoth)
      mbarrier_wait(tokens.full + Traits::kProducts, tokens.parity);
  }
  // To both CTAs of a pair, each of which fetched half. full: the stage's barrier.
  __device__ __forceinline__ void give_tokens_back(uint32_t full) const {
    if constexpr (Traits::kPair == 1) {
      if (operands.is_first_lane()) mbarrier_arrive(full + Traits::kEmpty);
    } else {
      const int lane = threadIdx.x % 32;
      if (lane < Traits::kPair) mbarrier_arrive_in_cluster(in_cta(full + Traits::kEmpty, lane));
    }
  }

  // One group of products of a step.
  template <int kStep, int kIssue>
  __device__ __forceinline__ void issue() {
    if constexpr (Operands::kMadeEarly) operands.template make<kStep, kIssue>();
    products_wait<1>();  // Those two groups before are over.
    if (kStep % 2 == 1 && kIssue == 0 && (kStep > 1 || last_tokens)) give_tokens_back(last_tokens);
    if constexpr (!Operands::kMadeEarly) operands.template make<kStep, kIssue>();
    operands.template pin<kStep, kIssue>();
    if (kStep % 2 == 0 && kIssue == 0) wait_for_tokens();
    if (kStep == kSteps - 1 && kIssue == Operands::kIssues - 1) {
      __syncwarp();
      if (operands.is_first_lane()) mbarrier_arrive(weights.full + Traits::kEmpty);
    }
    products_fence();
    operands.template multiply<kStep, kIssue>(sums, tokens.at);
    products_commit();
  }

  template <int kStep>
  __device__ __forceinline__ void step() {
    issue<kStep, 0>();
    if constexpr (Operands::kIssues == 2) issue<kStep, 1>();
    if (kStep % 2 == 1) {
      last_tokens = tokens.full;
      next_tokens();
    }
  }

  __device__ __forceinline__ void multiply_k_blocks(int count) {
    last_tokens = 0;
#pragma unroll 1
    for (int left = count; left > 0; --left) {
      mbarrier_wait(weights.full, weights.parity);
      operands.open();
      step<0>();
      step<1>();
      step<2>();
      step<3>();
      operands.move(weights.advance(shared.weight_bytes, params.weight_stages));
    }
    products_wait<0>();
    give_tokens_back(last_tokens);
  }

  // sums += P z^T, without the row's power. Behind the part's last row pair, that one is read
  // again.
  __device__ __forceinline__ void add_adapter(const PrefillPlace& place, int warp, int lane) {
    const int pair = min(place.first_pair + warp / kBlockTiles, place.end_pair - 1);
    const uint8_t* from =
        params.adapter_p +
        (int64_t(kBlockTiles * pair + warp % kBlockTiles) * params.adapter_steps * 32 + lane) * 16;
#pragma unroll 1
    for (int left = params.adapter_steps; left > 0; left -= kStageInputs / 16) {
      wait_for_tokens();
      uint32_t b = tokens.at;
#pragma unroll 1
      for (int i = min(left, kStageInputs / 16); i > 0; --i, b += 2, from += 512) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
        uint32_t a[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[j])::"memory");
        products_fence();
        Products<Traits::kTokens>::dense(T(), sums, a, b);
        products_commit();
        products_wait<0>();
      }
      give_tokens_back(tokens.full);
      next_tokens();
    }
  }

  __device__ __forceinline__ void multiply(int cluster, int rank_in_pair) {
    wait_for_predecessor();  // before anything is written, and a bias read
    PrefillWalk walk(params, cluster);
    while (walk.next(params, cluster)) {
      // Not all lanes may have stored something of the tile before.
      __syncwarp();
      const int thread = thread_index();
      barrier(1 + thread / 128, 128);
      operands.begin(params, PrefillPlace(params, walk.tile, rank_in_pair), thread / 32,
                     thread % 32);
      clear();
      const int k_blocks = walk.k_blocks(params, cluster);
      put_away(walk);
      multiply_k_blocks(k_blocks);
      take_back(walk);
      end(walk, cluster, rank_in_pair);
    }
  }

  // The walk, in the warp's staging memory, which nothing else uses while a tile is multiplied: it
  // needs no registers then.
  __device__ __forceinline__ uint32_t own_staging() const {
    const uint32_t thread = thread_index();
    return shared.base + Traits::kStagingAt + thread / 32 * kStagingBytes + thread % 32 * 8;
  }
  __device__ __forceinline__ void put_away(const PrefillWalk& walk) const {
    store_shared(own_staging(), {uint32_t(walk.tile), uint32_t(walk.unit)});
  }
  __device__ __forceinline__ void take_back(PrefillWalk& walk) const {
    uint32_t r[2];
    load_shared(r, own_staging());
    walk.tile = r[0], walk.unit = r[1];
  }

  // After the item's last K-block. What only the end needs is computed here, and kept from the
  // compiler before: it would stay in registers through the loop.
  __device__ __forceinline__ void end(const PrefillWalk& walk, int cluster, int rank_in_pair) {
    const PrefillPlace place(params, walk.tile, rank_in_pair);
    const int first = walk.first_k_block(params), count = walk.k_blocks(params, cluster);
    const int thread = thread_index();
    if constexpr (PrefillRows<Traits>::kPowers) {
#pragma unroll
      for (int i = 0; i < Traits::kTokens / 2; ++i) sums[i] *= operands.rows.inverse(i / 2 % 2);
    }
    if (params.adapter_steps && first + count == params.num_k_blocks)
      add_adapter(place, thread / 32, thread % 32);
    if (!place.exists) return;
    if (count == params.num_k_blocks)
      store_tile<Traits>(params, place, sums, shared.base, thread / 32, thread % 32);
    else
      store_share<Traits>(params, prefill_slot(params, cluster, first, rank_in_pair), sums, thread);
  }
};

}  // namespace slab
