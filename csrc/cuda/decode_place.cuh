// Where a CTA of the kernels for up to 16 tokens works. The host has divided: nothing here does.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

struct DecodePlace {
  int part;                     // which of the fused projections
  int first_pair, end_pair;     // row pairs: the CTA's first, and the end of the part
  int first_row, end_row;       // output features: the CTA's first, and the end of the part
  int first_token, tokens;      // of this CTA; as many of tile_tokens as exist
  int split;                    // which share of K
  int first_k_block, k_blocks;  // of this share
};

// The grid is (token tile, row tile, split): up to 16 tokens are one band of token tiles. What is
// not used costs nothing.
__device__ __forceinline__ DecodePlace decode_place(const LinearParams& params, int token_tile,
                                                    int row_tile, int split) {
  DecodePlace place;
  // Behind the last part, part_tile is the number of all tiles.
  place.part = 0;
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i)
    if (row_tile >= params.part_tile[i]) place.part = i;
  const int first_in_part = (row_tile - params.part_tile[place.part]) * params.warp_rows;
  place.first_pair = params.part_pair[place.part] + first_in_part;
  place.end_pair = params.part_pair[place.part + 1];
  place.first_row = params.part_row[place.part] + first_in_part * kBlockRows;
  place.end_row = params.part_row[place.part + 1];
  place.first_token = token_tile * params.tile_tokens;
  place.tokens = min(params.tile_tokens, params.tokens - place.first_token);
  place.split = split;
  place.first_k_block = place.split * params.k_share + min(place.split, params.k_more);
  place.k_blocks = params.k_share + (place.split < params.k_more ? 1 : 0);
  return place;
}
// Computed before the main loop and once more after it: what only the end needs would otherwise
// stay in registers through the loop.
__device__ __forceinline__ DecodePlace decode_place(const LinearParams& params) {
  return decode_place(params, keep(blockIdx.x), keep(blockIdx.y), keep(blockIdx.z));
}

}  // namespace slab
