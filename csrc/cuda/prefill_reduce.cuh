// Adds the shares of tiles that several clusters multiplied, in the order of K, and stores y.
//
// The grid is (tiles dealt by K-blocks x CTAs of a cluster x warps of a CTA, 64 tokens each). A
// warp takes 16 tokens of 16 rows; who multiplied them follows from the sizes alone.
#pragma once

#include "prefill_end.cuh"

namespace slab {

// The cluster that takes a K-block of the tiles that are dealt by K-blocks.
__device__ __forceinline__ int owner_of_unit(const PrefillParams& params, int unit) {
  const int of_larger = params.tail_more * (params.tail_share + 1);
  if (unit < of_larger) return unsigned(unit) / unsigned(params.tail_share + 1);
  return params.tail_more + unsigned(unit - of_larger) / unsigned(params.tail_share);
}

template <class T>
__device__ __forceinline__ void prefill_reduce(const PrefillParams& params) {
  __shared__ __align__(16) uint8_t staging[4 * kStagingBytes];
  let_successor_start();
  wait_for_predecessor();
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int row_warps = params.tile_rows / kTileRows;
  const unsigned cta = unsigned(blockIdx.x) / unsigned(row_warps);
  const int row_warp = blockIdx.x - cta * row_warps;
  const int number = cta / unsigned(params.cluster_ctas);
  const int rank = cta - number * params.cluster_ctas;
  const PrefillPlace place(params, params.whole_tiles + number, rank);
  const int eight = 8 * blockIdx.y + 2 * warp;  // of tokens: the first of two
  const int token = place.first_token + 8 * eight;
  if (!place.exists || 8 * eight >= params.tile_tokens || token >= params.tokens) return;

  const int first = number * params.num_k_blocks, end = first + params.num_k_blocks;
  int cluster = owner_of_unit(params, first);
  // One cluster has multiplied all of it, and stored y.
  if (first_tail_unit(params, cluster + 1) >= end) return;
  const int threads = 32 * row_warps;
  const int64_t slot_vectors = int64_t(params.tile_tokens / 8) * threads;
  float c[8] = {};
#pragma unroll 1
  for (int unit = first; unit < end; unit = first_tail_unit(params, ++cluster)) {
    const int slot = prefill_slot(params, cluster, unit - first, rank);
    const uint8_t* const from = reinterpret_cast<const uint8_t*>(params.partial) +
                                (slot * slot_vectors + eight * threads + 32 * row_warp + lane) * 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // Not through the read-only cache: they were written while this kernel ran.
      const uint4 r = load_global(from + j * threads * 16);
      c[4 * j] += __uint_as_float(r.x), c[4 * j + 1] += __uint_as_float(r.y);
      c[4 * j + 2] += __uint_as_float(r.z), c[4 * j + 3] += __uint_as_float(r.w);
    }
  }
  const int first_row = place.first_row + kTileRows * row_warp;
  float bias[2];
  load_bias(bias, params, first_row, place.end_row, lane);
  store_tokens<T>(params, shared_address(staging) + warp * kStagingBytes, c, bias, first_row,
                  place.end_row, token, lane);
}

}  // namespace slab
