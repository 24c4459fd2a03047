// Where a CTA and a warp of the fused linear work, and how a stage of the ring is laid out.
#pragma once

#include "traits.cuh"

namespace slab {

constexpr int kRaster = 8;  // token tiles that share a weight tile while it is in L2

// Where this CTA works.
struct Place {
  int part;                    // which of the fused projections
  int first_block, end_block;  // row blocks: the CTA's first, and the end of the part
  int first_row, end_row;      // output features: the CTA's first, and the end of the part
  int token_tile;
  int split;  // which share of K
};

// Computed before the main loop and once more after it: what only the end needs would otherwise
// stay in registers through the main loop, and spill.
template <int kRowTiles>
__device__ __forceinline__ Place place_of(const LinearParams& params) {
  const int band_tiles = kRaster * params.row_tiles, id = keep(blockIdx.x);
  const int first_token_tile = id / band_tiles * kRaster;
  const int band_width = min(kRaster, params.token_tiles - first_token_tile),
            in_band = id % band_tiles;
  const int row_tile = in_band / band_width;
  Place place;
  place.part = 0;
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i)
    if (i < params.parts && row_tile >= params.part_tile[i]) place.part = i;
  const int tile = row_tile - params.part_tile[place.part];
  place.first_block = params.part_block[place.part] + tile * params.warp_rows * kRowTiles;
  place.end_block = params.part_block[place.part + 1];
  place.first_row = params.part_row[place.part] + tile * params.warp_rows * kRowTiles * kBlockRows;
  place.end_row = params.part_row[place.part + 1];
  place.token_tile = first_token_tile + in_band % band_width;
  place.split = blockIdx.y;
  return place;
}

// What this warp does in its CTA.
struct WarpRole {
  int lane;
  int members, member;       // warps of a group, and which of them this is
  int group;                 // takes K-blocks group, group + warp_inputs, ...
  int row_warp, token_warp;  // which rows and which tokens of the CTA's tile
};

__device__ __forceinline__ WarpRole role_of(const LinearParams& params) {
  const int thread = keep(threadIdx.x), warp = thread / 32;
  WarpRole role;
  role.lane = thread % 32;
  role.members = params.warp_rows * params.warp_tokens;
  role.group = warp / role.members;
  role.member = warp % role.members;
  role.row_warp = role.member % params.warp_rows;
  role.token_warp = role.member / params.warp_rows;
  return role;
}

// The first K-block of a split; that of the split after it is its end.
__device__ __forceinline__ int first_k_block_of(const LinearParams& params, int split) {
  return int(unsigned(params.num_k_blocks) * unsigned(split) / unsigned(params.splits));
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

__device__ __forceinline__ float bias_of(const LinearParams& params, int feature) {
  if (params.bias_type == 1) return static_cast<const float*>(params.bias)[feature];
  if (params.bias_type == 2) return widen_fp16(static_cast<const uint16_t*>(params.bias)[feature]);
  if (params.bias_type == 3) return widen_bf16(static_cast<const uint16_t*>(params.bias)[feature]);
  return 0.0f;
}

}  // namespace slab
