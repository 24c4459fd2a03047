// Which tiles and K-blocks a cluster multiplies, and where they lie. All threads of it walk the
// same items, so nothing is handed over.
//
// Token tiles are numbered in bands of kBand, in which they go before row tiles: they share weights
// while these are in L2. Tiles below `whole_tiles` are dealt whole, in turn. Of the others,
// K-blocks are dealt evenly: a cluster takes one run of them, which may begin and end inside of a
// tile.
#pragma once

#include "prefill.h"
#include "ptx.cuh"

namespace slab {

// The first K-block of cluster i among those of the tiles that are dealt by K-blocks.
__device__ __forceinline__ int first_tail_unit(const PrefillParams& params, int cluster) {
  return cluster * params.tail_share + min(cluster, params.tail_more);
}

// The items of a cluster, one after the other. Little is kept, because it is alive while tiles are
// multiplied.
struct PrefillWalk {
  int tile, unit;  // of the present item; unit: its first K-block, if it is dealt by K-blocks

  __device__ __forceinline__ PrefillWalk(const PrefillParams& params, int cluster)
      : tile(cluster - params.clusters), unit(first_tail_unit(params, cluster)) {}

  // Goes to the next item, if there is one.
  __device__ __forceinline__ bool next(const PrefillParams& params, int cluster) {
    if (tile >= params.whole_tiles) unit += k_blocks(params, cluster);
    tile += params.clusters;
    if (tile < params.whole_tiles) return true;
    tile = params.whole_tiles + unsigned(unit) / unsigned(params.num_k_blocks);
    return unit < first_tail_unit(params, cluster + 1);
  }
  __device__ __forceinline__ int first_k_block(const PrefillParams& params) const {
    const int number = tile - params.whole_tiles;
    return number < 0 ? 0 : unit - number * params.num_k_blocks;
  }
  __device__ __forceinline__ int k_blocks(const PrefillParams& params, int cluster) const {
    if (tile < params.whole_tiles) return params.num_k_blocks;
    return min(params.num_k_blocks - first_k_block(params),
               first_tail_unit(params, cluster + 1) - unit);
  }
};

// Where a CTA's part of a tile lies.
struct PrefillPlace {
  int part;                  // which of the fused projections
  int first_pair, end_pair;  // row pairs: the tile's first, and the end of the part
  int first_row, end_row;    // output features: the tile's first, and the end of the part
  int first_token;
  bool exists;  // not behind the last row tile, as the second CTA of the last pair may be

  __device__ __forceinline__ PrefillPlace(const PrefillParams& params, int tile, int rank) {
    const unsigned groups =
        unsigned(params.row_tiles + params.cluster_ctas - 1) / unsigned(params.cluster_ctas);
    const unsigned band = unsigned(tile) / (kBand * groups), rest = tile - band * kBand * groups;
    const unsigned width = min(kBand, params.token_tiles - kBand * int(band)), row = rest / width;
    first_token = int(kBand * band + (rest - row * width)) * params.tile_tokens;
    const int wanted = int(row) * params.cluster_ctas + rank;
    exists = wanted < params.row_tiles;
    const int row_tile = min(wanted, params.row_tiles - 1);
    // Behind the last part, part_tile is the number of all tiles.
    part = 0;
#pragma unroll
    for (int i = 1; i < kMaxParts; ++i)
      if (row_tile >= params.part_tile[i]) part = i;
    const int tile_in_part = row_tile - params.part_tile[part];
    first_pair = params.part_pair[part] + tile_in_part * (params.tile_rows / kBlockRows);
    end_pair = params.part_pair[part + 1];
    first_row = params.part_row[part] + tile_in_part * params.tile_rows;
    end_row = params.part_row[part + 1];
  }
};

// The slot of `partial` for an item that is a share of a tile: two for each CTA, because a
// cluster's run ends one tile and begins another.
__device__ __forceinline__ int prefill_slot(const PrefillParams& params, int cluster,
                                            int first_k_block, int rank) {
  return (2 * cluster + (first_k_block > 0 ? 0 : 1)) * params.cluster_ctas + rank;
}

}  // namespace slab
