// y[M, N] = x S^T + sum_r ((x * v_r) B^T) * u_r + (x Q) P^T + bias for up to 16 tokens, where x and
// its products with v are too many columns for narrow.cuh.
//
//   let_successor_start()
//   ask for weights and v of the first stages
//   wait_for_predecessor(); ask for x of the first stages
//   for k in k_blocks[group :: warp_inputs]:            // the warps of a K group together
//     wait for the oldest stage                         // and for each other
//     for step in 0 .. 3:
//       b = 32 inputs of every token                    // ldmatrix
//       kept += mma.sp(values, metadata, b)
//       for each tile of 8 columns of the sign term:    // wide_signs.cuh
//         signs += mma.sp(+-1, pruned metadata, b * v)
//     wait for each other                               // the stage may be overwritten
//     ask for K-block k + stages * warp_inputs
//   the end: decode_end.cuh
//
// A K group is warp_rows warps of 32 rows each, which share x and v in the group's ring.
//
// Shared memory, in this order, in bytes:
//
//   u      128 warp_rows rank
//   rings  warp_inputs x stages x bytes of a stage (wide_stage.cuh)
//
// The sums of the end (decode_end.cuh) take the place of the rings.
#pragma once

#include "decode_end.cuh"
#include "decode_operands.cuh"
#include "wide_signs.cuh"
#include "wide_stage.cuh"

namespace slab {

// For 2, 3 or 4 stages, all of which are asked for.
__device__ __forceinline__ void copies_wait_for_oldest(int stages) {
  if (stages == 2)
    copies_wait<1>();
  else if (stages == 3)
    copies_wait<2>();
  else
    copies_wait<3>();
}

// The K-blocks of a K group, from the first one on that is not asked for yet.
template <class Traits>
struct WideLoop {
  static constexpr int kTiles = Traits::kTokenTiles;

  const LinearParams& params;
  const WideCopies<Traits>& copies;
  BlockOperands<Traits> block;
  KeptSums<Traits, kTiles> kept;
  WideSigns<Traits> signs;
  uint32_t weights_at;       // of this lane, in the first stage
  uint32_t even_at, odd_at;  // x for ldmatrix, in even and odd steps, in the first stage
  uint32_t stage_bytes, ring_bytes;
  int group;

  // With a ring at `slot` bytes from its first stage.
  template <int kStep>
  __device__ __forceinline__ void step(uint32_t slot) {
    uint32_t b[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      load_matrices(
          b[n], slot + (kStep % 2 ? odd_at : even_at) + (128 * (kStep / 2) + 8 * kTokenRow * n));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) kept.template multiply<kStep>(block, tile, b);
    if constexpr (Traits::kSigns) signs.template add<kStep>(block, b, slot);
    kept.template end_step<kStep>(block, params.group_steps);
  }

  // kStages: of the ring of a group of one warp. If it is 0, the group has several warps, which
  // wait for each other at a barrier.
  template <int kStages>
  __device__ __forceinline__ void multiply_k_blocks(int next, int end) {
    uint32_t slot = 0;
#pragma unroll 1
    for (; next < end; next += params.warp_inputs) {
      if constexpr (kStages == 0) {
        copies_wait_for_oldest(params.stages);
        barrier(1 + group, 32 * params.warp_rows);
      } else {
        copies_wait<kStages - 1>();
        __syncwarp();
      }
      block.open(slot + weights_at);
      step<0>(slot), step<1>(slot), step<2>(slot), step<3>(slot);
      if constexpr (kStages == 0)
        barrier(1 + group, 32 * params.warp_rows);
      else
        __syncwarp();
      copies.fetch(slot + weights_at, {slot + even_at, slot + odd_at}, next);
      copies_commit();
      slot = slot + stage_bytes == ring_bytes ? 0 : slot + stage_bytes;
    }
  }
};

template <class Traits>
__device__ __forceinline__ void wide(const LinearParams& params) {
  using T = typename Traits::Activation;
  constexpr int kTiles = Traits::kTokenTiles;
  extern __shared__ __align__(128) uint8_t shared[];
  let_successor_start();
  const int lane = threadIdx.x;
  // The same in all lanes, which the compiler can see only so: then what moves with the ring may be
  // one uniform register, which loads add to an address for nothing. (The loops that fill the ring
  // count stages for the same reason: otherwise ptxas does not find that `slot` is uniform.)
  const int group = __shfl_sync(~0u, int(threadIdx.z), 0);
  const int member = __shfl_sync(~0u, int(threadIdx.y), 0);
  const int rank = Traits::kSigns ? params.rank : 0;
  const DecodePlace place = decode_place(params, blockIdx.x, blockIdx.y, blockIdx.z);
  const WideStage<Traits> stage(params);
  const uint32_t u_at = shared_address(shared);
  const uint32_t rings_at = u_at + params.warp_rows * rank * (4 * kBlockRows);
  const uint32_t ring_bytes = params.stages * stage.bytes;
  const uint32_t ring = rings_at + group * ring_bytes;
  const uint32_t weights_at =
      keep(ring + stage.weights_at + member * stage.block_bytes + 16 * lane);
  const WideWeights<Traits> weights(params, place, member);
  int next = group;
  uint32_t slot = 0;
#pragma unroll 1
  for (int i = 0; i < params.stages; ++i, slot += stage.bytes, next += params.warp_inputs)
    if (next < place.k_blocks) weights.fetch(slot + weights_at, next);

  // Lane l names row l % 8 of matrix l / 8.
  const uint32_t even_at = keep(ring + staged_at(lane % 8, lane / 8));
  const uint32_t odd_at = Traits::kAnyRank ? even_at ^ 64 : keep(even_at ^ 64);
  const WideCopies<Traits> copies(weights, params, place, member);
  if constexpr (Traits::kSigns) {
    fetch_factors(params, place, u_at);
    next = group, slot = 0;
#pragma unroll 1
    for (int i = 0; i < params.stages; ++i, slot += stage.bytes, next += params.warp_inputs)
      if (next < place.k_blocks)
        copies.fetch_v(slot + weights_at, {slot + even_at, slot + odd_at}, next);
  }
  wait_for_predecessor();
  next = group, slot = 0;
#pragma unroll 1
  for (int i = 0; i < params.stages; ++i, slot += stage.bytes, next += params.warp_inputs) {
    if (next < place.k_blocks) copies.fetch_x({slot + even_at, slot + odd_at}, next);
    copies_commit();
  }

  WideLoop<Traits> loop = {params,
                           copies,
                           BlockOperands<Traits>(params.tokens, lane),
                           {},
                           WideSigns<Traits>(params, place, ring + stage.v_at),
                           weights_at,
                           even_at,
                           odd_at,
                           stage.bytes,
                           ring_bytes,
                           group};
  loop.kept.clear();
  if constexpr (!Traits::kAnyRank) {  // which has no registers to spare
    BlockOperands<Traits>& block = loop.block;
    block.sign_magic = pin(block.sign_magic), block.value_magic = pin(block.value_magic);
    block.narrow_at = pin(block.narrow_at), block.scales_at = pin(block.scales_at);
  }
  const int end = place.k_blocks + params.stages * params.warp_inputs;
  if (params.warp_rows > 1)
    loop.template multiply_k_blocks<0>(next, end);
  else if (params.stages == 2)
    loop.template multiply_k_blocks<2>(next, end);
  else if (params.stages == 3)
    loop.template multiply_k_blocks<3>(next, end);
  else
    loop.template multiply_k_blocks<4>(next, end);
  prefetch_next(params);

  if (Traits::kSparse && params.adapter_steps) {
    const DecodePlace same = decode_place(params);  // which needs no registers in the loop
    if (same.split == 0) add_adapter<T>(loop.kept.sum, params, same);
  }
  copies_wait_all();
  __syncthreads();  // No warp reads its ring any more.
  float* const sums = reinterpret_cast<float*>(shared + (rings_at - u_at));
  float* const own = own_sums(sums, params, params.tile_tokens * (1 + rank));
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    store_columns(own, params, loop.kept.sum, n, 8 * n, 0, params.tile_tokens - 8 * n);
  if constexpr (Traits::kSigns) loop.signs.store(own, params);
  __syncthreads();
  write_result<T>(params, sums, reinterpret_cast<const uint32_t*>(shared));
}

}  // namespace slab
