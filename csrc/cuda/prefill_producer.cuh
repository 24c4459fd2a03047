// The warpgroup that fetches: one thread asks for weights, one for activations, and for
// kPrefillBoth two warps multiply these by v. Weights are asked for while the kernel before this
// one may still write the activations.
#pragma once

#include "hopper.cuh"
#include "prefill_place.cuh"
#include "prefill_traits.cuh"

namespace slab {

// Blocks of the tile's row pairs, then v of every rank. Behind the part's last row pair, that one
// is read again.
template <class Traits>
__device__ __forceinline__ void fetch_weights(const PrefillParams& params,
                                              const PrefillShared<Traits>& shared, int cluster,
                                              int rank_in_pair) {
  constexpr bool kReadsV = Traits::kKind == kPrefillRebuild;
  const int ranks = !kReadsV ? 0 : Traits::kAny ? params.rank : 1;
  const uint32_t bytes = Traits::kPairs * shared.block_bytes + ranks * kTokenRow;
  const int64_t pair_bytes = int64_t(params.num_k_blocks) * shared.block_bytes;
  PrefillRing ring = shared.weight_ring(1);  // the first round waits for nobody
  PrefillWalk walk(params, cluster);
  while (walk.next(params, cluster)) {
    const PrefillPlace place(params, walk.tile, rank_in_pair);
    const int first_k_block = walk.first_k_block(params);
    const uint8_t* first =
        params.stream + place.first_pair * pair_bytes + int64_t(first_k_block) * shared.block_bytes;
    const int last = place.end_pair - 1 - place.first_pair;
    const uint8_t* v =
        params.v + (int64_t(place.part) * ranks * params.num_k_blocks + first_k_block) * kTokenRow;
#pragma unroll 1
    for (int left = walk.k_blocks(params, cluster); left > 0; --left) {
      mbarrier_wait(ring.full + Traits::kEmpty, ring.parity);
      mbarrier_arrive_expecting(ring.full, bytes);
      uint32_t to = ring.at;
      const uint8_t* from = first;
#pragma unroll 1
      for (int pair = 0; pair < Traits::kPairs; ++pair) {
        copy_bulk(to, from, shared.block_bytes, ring.full);
        to += shared.block_bytes;
        if (pair < last) from += pair_bytes;
      }
      if constexpr (kReadsV) {
        const uint8_t* v_from = v;
#pragma unroll 1
        for (int r = 0; r < ranks; ++r) {
          copy_bulk(to, v_from, kTokenRow, ring.full);
          to += kTokenRow, v_from += int64_t(params.num_k_blocks) * kTokenRow;
        }
        v += kTokenRow;
      }
      first += shared.block_bytes;
      ring.advance(shared.weight_bytes, params.weight_stages);
    }
  }
}

// x in stages of 64 inputs; for the item with a tile's last K-block also z = x Q.
template <class Traits>
__device__ __forceinline__ void fetch_tokens(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int cluster,
                                             int rank_in_pair) {
  wait_for_predecessor();
  PrefillRing ring = shared.token_ring(1);
  PrefillWalk walk(params, cluster);
  while (walk.next(params, cluster)) {
    const PrefillPlace place(params, walk.tile, rank_in_pair);
    constexpr int kBoxTokens = Traits::kTokens / Traits::kPair;
    const int first_k_block = walk.first_k_block(params);
    const int k_blocks = walk.k_blocks(params, cluster);
    int column = first_k_block * kBlockInputs;
#pragma unroll 1
    for (int left = 2 * k_blocks; left > 0; --left) {
      mbarrier_wait(ring.full + Traits::kEmpty, ring.parity);
      mbarrier_arrive_expecting(ring.full, Traits::kBoxBytes);
      if constexpr (Traits::kPair == 1)
        copy_box(ring.at, &params.x_map, column, place.first_token, ring.full);
      else  // The other CTA fetches the other tokens for both.
        copy_box_to_pair(ring.at + rank_in_pair * (Traits::kBoxBytes / 2), &params.x_map, column,
                         place.first_token + rank_in_pair * kBoxTokens, ring.full);
      column += kStageInputs;
      ring.advance(Traits::kTokenBytes, params.token_stages);
    }
    if (first_k_block + k_blocks < params.num_k_blocks) continue;
    column = place.part * 16 * params.adapter_steps;
#pragma unroll 1
    for (int left = params.adapter_steps; left > 0; left -= kStageInputs / 16) {
      mbarrier_wait(ring.full + Traits::kEmpty, ring.parity);
      mbarrier_arrive_expecting(ring.full, Traits::kBoxBytes);
      // Each CTA of a pair by itself: their rows may be of different parts.
#pragma unroll
      for (int i = 0; i < Traits::kPair; ++i)
        copy_box(ring.at + i * (Traits::kBoxBytes / 2), &params.z_map, column,
                 place.first_token + i * kBoxTokens, ring.full);
      column += kStageInputs;
      ring.advance(Traits::kTokenBytes, params.token_stages);
    }
  }
}

// v * x beside x, by 64 threads: a thread's eight inputs are the same for all tokens.
template <class Traits>
__device__ __forceinline__ void multiply_tokens(const PrefillParams& params,
                                                const PrefillShared<Traits>& shared, int cluster,
                                                int thread) {
  using T = typename Traits::Activation;
  constexpr int kPieces = 2 * kStageInputs / 16, kTogether = 64 / kPieces;  // tokens at a time
  constexpr int kHeld = 4;  // times that, in registers
  const int piece = thread % kPieces, token = thread / kPieces;
  const uint32_t own = 128 * token + 16 * (piece ^ token % 8);  // the swizzle
  PrefillRing ring = shared.token_ring(0);
  PrefillWalk walk(params, cluster);
  while (walk.next(params, cluster)) {
    const PrefillPlace place(params, walk.tile, 0);
    const int first_k_block = walk.first_k_block(params);
    const int k_blocks = walk.k_blocks(params, cluster);
    const uint8_t* from = params.v +
                          (int64_t(place.part) * params.num_k_blocks + first_k_block) * kTokenRow +
                          16 * piece;
    uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    // Stages of z come last; nothing is multiplied in these.
    const bool last = first_k_block + k_blocks == params.num_k_blocks;
    const int more = last ? (params.adapter_steps + 3) / 4 : 0;
#pragma unroll 1
    for (int left = 2 * k_blocks + more; left > 0; --left) {
      const bool of_x = left > more;
      mbarrier_wait(ring.full, ring.parity);
      if (of_x) {
        const uint32_t at = ring.at + own;
#pragma unroll
        for (int i = 0; i < Traits::kTokens / kTogether; i += kHeld) {
          uint32_t x[kHeld][4];
#pragma unroll
          for (int j = 0; j < kHeld; ++j) load_shared(x[j], at + 128 * kTogether * (i + j));
#pragma unroll
          for (int j = 0; j < kHeld; ++j) {
            x[j][0] = T::multiply(x[j][0], v.x), x[j][1] = T::multiply(x[j][1], v.y);
            x[j][2] = T::multiply(x[j][2], v.z), x[j][3] = T::multiply(x[j][3], v.w);
            store_shared(at + Traits::kBoxBytes + 128 * kTogether * (i + j), x[j]);
          }
        }
        from += 2 * kStageInputs;
        if (left > more + 1) v = __ldg(reinterpret_cast<const uint4*>(from));
        publish_to_async_proxy();
      }
      mbarrier_arrive(ring.full + Traits::kProducts);
      ring.advance(Traits::kTokenBytes, params.token_stages);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void produce(const PrefillParams& params,
                                        const PrefillShared<Traits>& shared, int cluster,
                                        int rank_in_pair, int warp, int lane) {
  give_registers<Traits::kProducerRegisters>();
  if (warp == 0) {
    if (lane == 0) fetch_weights(params, shared, cluster, rank_in_pair);
  } else if (warp == 1) {
    if (lane == 0) fetch_tokens(params, shared, cluster, rank_in_pair);
  } else if constexpr (Traits::kKind == kPrefillBoth) {
    multiply_tokens(params, shared, cluster, 32 * (warp - 2) + lane);
  }
}

}  // namespace slab
