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

// Computed before the main loop and once more after it: what only the end needs would otherwise
// stay in registers through the loop. What is not used costs nothing.
__device__ __forceinline__ DecodePlace decode_place(const LinearParams& params) {
  const int token_tile_in_band = keep(blockIdx.x), row_tile = keep(blockIdx.y),
            z = keep(blockIdx.z);
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

}  // namespace slab
