// The warpgroups that multiply: 64 rows each for all tokens of the tile.
//
// In each step of 32 inputs a warpgroup makes its operands in registers and issues the products with
// activations in shared memory; at most those of the step before it are still on their way. What
// they have read is given back to the thread that fetches: activations when the products are over
// that read them, weights when the last step's operands are made.
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
  const int warp, lane;
  float sums[Traits::kTokens / 2];  // c of wgmma.cuh
  Operands operands;
  PrefillRing weights, tokens;
  uint32_t last_tokens;  // the barrier of the stage whose products may be on their way, or 0

  __device__ __forceinline__ PrefillConsumer(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int warp,
                                             int lane)
      : params(params), shared(shared), warp(warp), lane(lane),
        operands(params, shared, warp, lane),
        weights(shared.weight_ring(0)), tokens(shared.descriptor_ring(0)) {}

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
      if (lane == 0) mbarrier_arrive(full + Traits::kEmpty);
    } else {
      if (lane < Traits::kPair) mbarrier_arrive_in_cluster(in_cta(full + Traits::kEmpty, lane));
    }
  }

  template <int kStep>
  __device__ __forceinline__ void step() {
    if constexpr (Operands::kMadeEarly) operands.template make<kStep>();
    products_wait<1>();  // Those of two steps ago are over.
    if (kStep % 2 == 1 && (kStep > 1 || last_tokens)) give_tokens_back(last_tokens);
    if constexpr (!Operands::kMadeEarly) operands.template make<kStep>();
    operands.template pin<kStep>();
    if (kStep % 2 == 0) wait_for_tokens();
    if (kStep == kSteps - 1) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(weights.full + Traits::kEmpty);
    }
    products_fence();
    operands.template multiply<kStep>(sums, tokens.at);
    products_commit();
    if (kStep % 2 == 1) {
      last_tokens = tokens.full;
      shared.next_descriptor(tokens, params.token_stages);
    }
  }

  __device__ __forceinline__ void multiply_k_blocks(int count) {
    last_tokens = 0;
#pragma unroll 1
    for (int left = count; left > 0; --left) {
      mbarrier_wait(weights.full, weights.parity);
      operands.open(weights.at);
      step<0>();
      step<1>();
      step<2>();
      step<3>();
      shared.next_weights(weights, params.weight_stages);
    }
    products_wait<0>();
    give_tokens_back(last_tokens);
  }

  // sums += P z^T, without the row's power. Behind the part's last row pair, that one is read again.
  __device__ __forceinline__ void add_adapter(const PrefillPlace& place) {
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
      shared.next_descriptor(tokens, params.token_stages);
    }
  }

  __device__ __forceinline__ void multiply(int cluster, int rank_in_pair) {
    wait_for_predecessor();  // before anything is written, and a bias read
    PrefillWalk walk(params, cluster);
    while (walk.next(params)) {
      // Not all lanes may have stored something of the tile before.
      __syncwarp();
      barrier(1 + warp / 4, 128);
      const PrefillPlace place(params, walk.tile, rank_in_pair);
      operands.begin(params, place, warp, lane);
      clear();
      multiply_k_blocks(walk.k_blocks);
      if constexpr (PrefillRows<Traits>::kPowers) {
#pragma unroll
        for (int i = 0; i < Traits::kTokens / 2; ++i)
          sums[i] *= operands.rows.inverse(i / 2 % 2);
      }
      if (params.adapter_steps && walk.is_last(params)) add_adapter(place);
      if (!place.exists) continue;
      if (walk.is_whole(params))
        store_tile<Traits>(params, place, sums, shared.base, warp, lane);
      else
        store_share<Traits>(params,
                            prefill_slot(params, cluster, walk.first_k_block, rank_in_pair), sums,
                            32 * warp + lane);
    }
  }
};

}  // namespace slab
