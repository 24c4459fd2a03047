// Where a CTA and a warp of the fused linear work, and how a stage of the ring is laid out. Nothing
// here is divided: grid, block and the shares of K come from backends/cuda/launch.py.
#pragma once

#include "traits.cuh"

namespace slab {

// Where this CTA works.
struct Place {
  int part;                  // which of the fused projections
  int first_pair, end_pair;  // row pairs: the CTA's first, and the end of the part
  int first_row, end_row;    // output features: the CTA's first, and the end of the part
  int token_tile;
  int split;  // which share of K
};

// The grid is (token tile of a band, row tile, split of K, or band where K is not split): the token
// tiles of a band share a weight tile while it is in L2.
__device__ __forceinline__ int token_tile_of(const LinearParams& params) {
  return blockIdx.x + (params.splits > 1 ? 0 : kBand * blockIdx.z);
}

// Computed before the main loop and once more after it: what only the end needs would otherwise
// stay in registers through the main loop, and spill.
template <int kPairs>
__device__ __forceinline__ Place place_of(const LinearParams& params) {
  const int row_tile = keep(blockIdx.y);
  Place place;
  place.part = 0;
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i)
    if (i < params.parts && row_tile >= params.part_tile[i]) place.part = i;
  const int first = (row_tile - params.part_tile[place.part]) * params.warp_rows * kPairs;
  place.first_pair = params.part_pair[place.part] + first;
  place.end_pair = params.part_pair[place.part + 1];
  place.first_row = params.part_row[place.part] + first * kBlockRows;
  place.end_row = params.part_row[place.part + 1];
  place.token_tile = token_tile_of(params);
  place.split = params.splits > 1 ? blockIdx.z : 0;
  return place;
}

// What this warp does in its CTA.
struct WarpRole {
  int lane;
  int members, member;       // warps of a group, and which of them this is
  int group;                 // takes K-blocks group, group + warp_inputs, ...
  int row_warp, token_warp;  // which rows and which tokens of the CTA's tile
};

// The block is (lane, member, group). warp_rows is a power of two. Only a shuffle tells the compiler
// that member and group are the same for all lanes of a warp, which then need not be brought
// together again after a branch.
__device__ __forceinline__ WarpRole role_of(const LinearParams& params) {
  WarpRole role;
  role.lane = keep(threadIdx.x);
  role.members = params.warp_rows * params.warp_tokens;
  role.member = __shfl_sync(~0u, int(threadIdx.y), 0);
  role.group = __shfl_sync(~0u, int(threadIdx.z), 0);
  role.row_warp = role.member & (params.warp_rows - 1);
  role.token_warp = role.member >> (31 - __clz(params.warp_rows));
  return role;
}

// The first K-block of a split; that of the split after it is its end.
__device__ __forceinline__ int first_k_block_of(const LinearParams& params, int split) {
  return split * params.k_share + min(split, params.k_more);
}

// A stage of the ring is one K-block: rows of activations, rows of v, blocks of weights, in this
// order. In bytes.
struct StageLayout {
  int v_rows_at, weights_at;  // from the start of a stage
  int block_bytes;            // of a block of weights
};

// The stages of one group, in shared memory.
struct Ring {
  uint32_t begin, end, stage_bytes;
  __device__ __forceinline__ uint32_t after(uint32_t stage) const {
    return stage + stage_bytes == end ? begin : stage + stage_bytes;
  }
};

}  // namespace slab
