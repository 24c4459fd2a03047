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

template <class Traits>
struct PrefillOperands {
  using Type = SparseOperands<Traits>;
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
  RingStage weights{0}, tokens{0};
  int last_tokens;  // the stage whose products may still be on their way, or -1

  __device__ __forceinline__ PrefillConsumer(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int warp,
                                             int lane)
      : params(params), shared(shared), warp(warp), lane(lane),
        operands(params, shared, warp, lane) {}

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Traits::kTokens / 2; ++i) sums[i] = 0.0f;
  }

  __device__ __forceinline__ uint32_t tokens_at() const {
    return shared.tokens + tokens.number * Traits::kTokenBytes;
  }
  __device__ __forceinline__ void wait_for_tokens() const {
    const uint32_t full = shared.base + Traits::kFullTokensAt + 8 * tokens.number;
    mbarrier_wait(full, tokens.parity);
    if constexpr (Traits::kKind == kPrefillBoth)
      mbarrier_wait(full + Traits::kFullProductsAt - Traits::kFullTokensAt, tokens.parity);
  }
  // To both CTAs of a pair, each of which fetched half.
  __device__ __forceinline__ void give_tokens_back(int stage) const {
    const uint32_t empty = shared.base + Traits::kEmptyTokensAt + 8 * stage;
    if constexpr (Traits::kPair == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else {
      if (lane < Traits::kPair) mbarrier_arrive_in_cluster(in_cta(empty, lane));
    }
  }

  template <int kStep>
  __device__ __forceinline__ void step() {
    if constexpr (Operands::kMadeEarly) operands.template make<kStep>();
    products_wait<1>();  // Those of two steps ago are over.
    if (kStep % 2 == 1 && (kStep > 1 || last_tokens >= 0)) give_tokens_back(last_tokens);
    if constexpr (!Operands::kMadeEarly) operands.template make<kStep>();
    operands.template pin<kStep>();
    if (kStep % 2 == 0) wait_for_tokens();
    if (kStep == kSteps - 1) {
      __syncwarp();
      if (lane == 0)
        mbarrier_arrive(shared.base + Traits::kEmptyWeightsAt + 8 * weights.number);
    }
    products_fence();
    operands.template multiply<kStep>(sums, tokens_descriptor(tokens_at()));
    products_commit();
    if (kStep % 2 == 1) {
      last_tokens = tokens.number;
      tokens.advance(params.token_stages);
    }
  }

  __device__ __forceinline__ void multiply_k_blocks(int count) {
    last_tokens = -1;
#pragma unroll 1
    for (int left = count; left > 0; --left) {
      mbarrier_wait(shared.base + Traits::kFullWeightsAt + 8 * weights.number, weights.parity);
      operands.open(shared.weights + weights.number * shared.weight_bytes);
      step<0>();
      step<1>();
      step<2>();
      step<3>();
      weights.advance(params.weight_stages);
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
      uint64_t b = tokens_descriptor(tokens_at());
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
      give_tokens_back(tokens.number);
      tokens.advance(params.token_stages);
    }
  }

  __device__ __forceinline__ void multiply(int cluster, int rank_in_pair) {
    wait_for_predecessor();  // before anything is written, and a bias read
    PrefillWalk walk(params, cluster);
    while (walk.next(params)) {
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
