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

// Of the CTA (x, y, z) of the grid. What is not used costs nothing.
__device__ __forceinline__ DecodePlace decode_place(const LinearParams& params, int x, int y,
                                                    int z) {
  const int token_tile_in_band = x, row_tile = y;
  DecodePlace place;
  place.part = 0;
  int first_tile = 0, first_pair = 0, first_row = 0;
  place.end_pair = params.part_pair[1], place.end_row = params.part_row[1];
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i)
    if (i < params.parts && row_tile >= params.part_tile[i]) {
      place.part = i, first_tile = params.part_tile[i], first_pair = params.part_pair[i];
      first_row = params.part_row[i];
      place.end_pair = params.part_pair[i + 1], place.end_row = params.part_row[i + 1];
    }
  const int tile_pairs = (row_tile - first_tile) * params.warp_rows;
  place.first_pair = first_pair + tile_pairs;
  place.first_row = first_row + tile_pairs * kBlockRows;
  const bool divided = params.splits > 1;
  const int token_tile = token_tile_in_band + (divided ? 0 : z * kBand);
  place.first_token = token_tile * params.tile_tokens;
  place.tokens = min(params.tile_tokens, params.tokens - place.first_token);
  place.split = divided ? z : 0;
  place.first_k_block = place.split * params.k_share + min(place.split, params.k_more);
  place.k_blocks = params.k_share + (place.split < params.k_more ? 1 : 0);
  return place;
}

__device__ __forceinline__ DecodePlace decode_place(const LinearParams& params) {
  return decode_place(params, blockIdx.x, blockIdx.y, blockIdx.z);
}
// The same, computed once more after the main loop: what only the end needs would otherwise stay in
// registers through the loop.
__device__ __forceinline__ DecodePlace decode_place_again(const LinearParams& params) {
  return decode_place(params, keep(blockIdx.x), keep(blockIdx.y), keep(blockIdx.z));
}

}  // namespace slab
