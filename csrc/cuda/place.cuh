// Where a CTA and a warp of the fused linear work, and the bias of an output feature.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

constexpr int kRaster = 8;  // token tiles that share a weight tile while it is in L2

// Where this CTA works.
struct Place {
  int part, first_block, end_block, first_row, end_row;  // row blocks and output features of the part's rows
  int token, split;                                      // token tile, share of K
};

// Asked again after the main loop: what only the end needs would be spilled on the way.
template <int kRowTiles>
__device__ __forceinline__ Place place_of(const LinearParams& p) {
  const int whole = kRaster * p.row_tiles, id = keep(blockIdx.x);
  const int band = id / whole * kRaster, wide = min(kRaster, p.token_tiles - band), rest = id % whole;
  const int row_tile = rest / wide;
  Place at;
  at.part = 0;
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i)
    if (i < p.parts && row_tile >= p.part_tile[i]) at.part = i;
  const int tile = row_tile - p.part_tile[at.part];
  at.first_block = p.part_block[at.part] + tile * p.warp_rows * kRowTiles;
  at.end_block = p.part_block[at.part + 1];
  at.first_row = p.part_row[at.part] + tile * p.warp_rows * kRowTiles * kBlockRows;
  at.end_row = p.part_row[at.part + 1];
  at.token = band + rest % wide;
  at.split = blockIdx.y;
  return at;
}

// What this warp does in its CTA. Members are the warps of a group.
struct Role {
  int lane, members, member, group, row_warp, token_warp;
};

__device__ __forceinline__ Role role_of(const LinearParams& p) {
  const int thread = keep(threadIdx.x), warp = thread / 32;
  Role my;
  my.lane = thread % 32;
  my.members = p.warp_rows * p.warp_tokens;
  my.group = warp / my.members;
  my.member = warp % my.members;
  my.row_warp = my.member % p.warp_rows;
  my.token_warp = my.member / p.warp_rows;
  return my;
}

__device__ __forceinline__ float bias_of(const LinearParams& p, int feature) {
  if (p.bias_type == 1) return static_cast<const float*>(p.bias)[feature];
  if (p.bias_type == 2) return widen_fp16(static_cast<const uint16_t*>(p.bias)[feature]);
  if (p.bias_type == 3) return widen_bf16(static_cast<const uint16_t*>(p.bias)[feature]);
  return 0.0f;
}

}  // namespace slab
