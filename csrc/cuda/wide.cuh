// y[M, N] = x S^T + sum_r ((x * v_r) B^T) * u_r + (x Q) P^T + bias for up to 16 tokens, where x and
// its products with v are too many columns for narrow.cuh.
//
//   let_successor_start()
//   ask for weights and v of the first stages
//   wait_for_predecessor(); ask for x of the first stages
//   for k in k_blocks[group :: warp_inputs]:          // the warps of a K group together
//     wait for the oldest stage                       // and for each other
//     for step in 0 .. 3:
//       b = 32 inputs of every token                  // ldmatrix
//       kept += mma.sp(values, metadata, b)
//       for each 8 columns (rank, token) of the sign term:
//         signs += mma.sp(+-1, pruned metadata, b * v)
//     wait for each other                             // the stage may be overwritten
//     ask for K-block k + stages * warp_inputs
//   the end: decode_end.cuh
//
// A K group is warp_rows warps of 32 rows each, which share the activations of the group's ring.
//
// Shared memory, in this order, in bytes (wide_stage.cuh lays out a stage):
//
//   u      128 warp_rows rank
//   rings  warp_inputs x stages x stage_bytes()
//
// The sums of the end (decode_end.cuh) take the place of the rings.
#pragma once

#include "decode_end.cuh"
#include "decode_operands.cuh"
#include "wide_stage.cuh"

namespace slab {

// The sign term: its sums, and where its columns are made from.
template <class Traits>
struct WideSigns {
  using T = typename Traits::Activation;
  static constexpr int kTiles = Traits::kSignTiles;

  float sum[2][kTiles][4];
  uint32_t v_at;  // for ldmatrix: lane l names a row of matrix l / 8, which are all the same

  __device__ __forceinline__ WideSigns(const LinearParams& params, const DecodePlace& place,
                                       const WideStage<Traits>& stage, uint32_t ring) {
    v_at = ring + stage.v_at + threadIdx.x / 8 * 16;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[tile][n][i] = 0.0f;
  }

  template <int kStep>
  __device__ __forceinline__ void add(const BlockOperands<Traits>& block, const uint32_t (&b)[Traits::kTokenTiles][4], uint32_t slot) {
    uint32_t v[4], vx[kTiles][4];
    load_matrices(v, v_at + slot + 64 * kStep);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) vx[n][i] = T::multiply(b[n][i], v[i]);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t a[4];
      block.template load_signs<kStep>(a, tile);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        T::template mma_sparse<kStep % 2>(sum[tile][n], a, vx[n], block.pruned[tile][kStep / 2]);
    }
  }
  __device__ __forceinline__ void store(float* own, const LinearParams& params) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      store_columns(own, params, sum, n, params.tile_tokens + 8 * n, 0, params.tile_tokens - 8 * n);
  }
};

// How the warps of a K group wait for each other and for copies: 0 if there are several warps, else
// the stages of its ring. A barrier of one warp would take one of the CTA's 16 barriers for nothing.
__device__ __forceinline__ int waiting_mode(const LinearParams& params) {
  return keep(params.warp_rows > 1 ? 0 : params.stages);
}

// Waits until the oldest stage is here, copied by every warp of the group.
__device__ __forceinline__ void wait_for_stage(const LinearParams& params, int mode, int group) {
  if (mode == 3) {
    copies_wait<2>();
  } else if (mode == 2) {
    copies_wait<1>();
  } else if (mode == 4) {
    copies_wait<3>();
  } else {
    copies_wait_for_oldest(params.stages);
    barrier(1 + group, 32 * params.warp_rows);
  }
  __syncwarp();
}

// No warp of the group reads its oldest stage any more.
__device__ __forceinline__ void leave_stage(const LinearParams& params, int mode, int group) {
  __syncwarp();
  if (mode == 0) {
    // This waits for nothing: there are no more copies on their way. It keeps ptxas from executing
    // the barrier's five instructions under a predicate where there is one warp.
    copies_wait<kMostStages - 1>();
    barrier(1 + group, 32 * params.warp_rows);
  }
}

template <class Traits>
__device__ __forceinline__ void wide(const LinearParams& params) {
  using T = typename Traits::Activation;
  constexpr int kTiles = Traits::kTokenTiles;
  extern __shared__ __align__(256) uint8_t shared[];
  let_successor_start();
  const int lane = threadIdx.x;
  // The same in all lanes, which the compiler can see only so: then what moves with the ring is one
  // uniform register, and addresses need no additions.
  const int group = __shfl_sync(~0u, int(threadIdx.z), 0);
  const int member = __shfl_sync(~0u, int(threadIdx.y), 0);
  const int rank = Traits::kSigns ? params.rank : 0;
  const DecodePlace place = decode_place(params);
  const WideStage<Traits> stage(params);
  const uint32_t u_at = shared_address(shared);
  const uint32_t rings_at = u_at + params.warp_rows * rank * (4 * kBlockRows);
  const uint32_t ring_bytes = params.stages * stage.bytes;
  const uint32_t ring = rings_at + group * ring_bytes;
  const WideCopies<Traits> copies(params, place, stage, member);
  BlockAddress weights_at(ring + stage.weights_at + member * stage.block_bytes, lane);
  weights_at.narrow = keep(weights_at.narrow), weights_at.scales = keep(weights_at.scales);
  // x for ldmatrix, in even and in odd steps: lane l names row l % 8 of matrix l / 8.
  const uint32_t even_at = keep(ring + staged_at(lane % 8, lane / 8)), odd_at = keep(even_at ^ 64);

  int next = group;
  uint32_t slot = 0;
#pragma unroll 1
  for (int i = 0; i < params.stages; ++i, slot += stage.bytes, next += params.warp_inputs)
    if (next < place.k_blocks) copies.fetch_weights(slot + weights_at.wide, next);
  if constexpr (Traits::kSigns) fetch_factors(params, place, u_at);
  wait_for_predecessor();
  next = group, slot = 0;
#pragma unroll 1
  for (int i = 0; i < params.stages; ++i, slot += stage.bytes, next += params.warp_inputs) {
    if (next < place.k_blocks)
      copies.fetch_activations(slot + even_at, slot + odd_at, next);
    copies_commit();
  }

  BlockOperands<Traits> block(params.tokens);
  KeptSums<Traits, kTiles> kept;
  kept.clear();
  WideSigns<Traits> signs(params, place, stage, ring);
  const int mode = waiting_mode(params);
  const int end = place.k_blocks + params.stages * params.warp_inputs;
  slot = 0;
#pragma unroll 1
  for (; next < end; next += params.warp_inputs) {
    wait_for_stage(params, mode, group);
    block.open(BlockAddress(weights_at, slot));
    const auto step = [&](auto number) {
      constexpr int kStep = decltype(number)::value;
      uint32_t b[kTiles][4];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        load_matrices(b[n], slot + (kStep % 2 ? odd_at : even_at) + 128 * (kStep / 2) +
                                8 * kTokenRow * n);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) kept.template multiply<kStep>(block, tile, b);
      if constexpr (Traits::kSigns) signs.template add<kStep>(block, b, slot);
      kept.template end_step<kStep>(block, params.group_steps);
    };
    step(Number<0>()), step(Number<1>()), step(Number<2>()), step(Number<3>());
    leave_stage(params, mode, group);
    copies.fetch(slot + weights_at.wide, slot + even_at, slot + odd_at, next);
    copies_commit();
    slot = slot + stage.bytes == ring_bytes ? 0 : slot + stage.bytes;
  }
  prefetch_next(params);

  if (Traits::kSparse && params.adapter_steps && place.split == 0)
    add_adapter<T>(kept.sum, params, place);
  copies_wait_all();
  __syncthreads();  // No warp reads its ring any more.
  float* const sums = reinterpret_cast<float*>(shared + (rings_at - u_at));
  const int columns = params.tile_tokens * (1 + rank);
  float* const own = own_sums(sums, params, columns);
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    store_columns(own, params, kept.sum, n, 8 * n, 0, params.tile_tokens - 8 * n);
  if constexpr (Traits::kSigns) signs.store(own, params);
  __syncthreads();
  write_result<T>(params, sums, reinterpret_cast<const uint32_t*>(shared));
}

}  // namespace slab
