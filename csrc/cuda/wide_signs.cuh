// The sign term of wide.cuh: columns v_r x, their products with +-1 or the levels, and the sums.
//
// The sign operand of a step is made once, whatever the rank: u comes at the end (decode_end.cuh).
#pragma once

#include "decode_end.cuh"
#include "decode_operands.cuh"
#include "wide_stage.cuh"

namespace slab {

// Rank one, or none: the columns of x's fragments times v's fragment.
template <class Traits, bool kAnyRank = Traits::kAnyRank>
struct WideSigns {
  using T = typename Traits::Activation;
  static constexpr int kTiles = Traits::kSigns ? Traits::kTokenTiles : 1;

  float sum[2][kTiles][4];
  uint32_t v_at;  // for ldmatrix: the eight rows of a matrix are all v

  // first_v: of the first stage.
  __device__ __forceinline__ WideSigns(const LinearParams&, const DecodePlace&, uint32_t first_v)
      : v_at(first_v + threadIdx.x / 8 * 16) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[tile][n][i] = 0.0f;
  }

  template <int kStep>
  __device__ __forceinline__ void add(const BlockOperands<Traits>& block,
                                      const uint32_t (&b)[kTiles][4], uint32_t slot) {
    uint32_t v[4], vx[kTiles][4];
    load_matrices(v, slot + v_at + 64 * kStep);
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

// Any rank: column r T + t is row t of x times row r of v, T being params.tile_tokens. There are at
// most 32, in tiles of eight, of which those that exist are multiplied.
template <class Traits>
struct WideSigns<Traits, true> {
  using T = typename Traits::Activation;
  static constexpr int kTiles = Traits::kSignTiles;

  float sum[2][kTiles][4];
  uint32_t x_at[kTiles], v_at[kTiles];  // for ldmatrix, in even steps, less the ring's first stage
  int columns;

  __device__ __forceinline__ WideSigns(const LinearParams& params, const DecodePlace& place,
                                       uint32_t first_v)
      : columns(params.tile_tokens * params.rank) {
    const uint32_t first_x = first_v - params.tile_tokens * kTokenRow;
    const int lane = threadIdx.x;
    int r = 0, t = lane % 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // No division: this takes few rounds, while the first stages are on their way.
#pragma unroll 1
      for (; t >= params.tile_tokens; t -= params.tile_tokens) ++r;
      // Columns that do not exist, and those of a token that does not, repeat others and are not
      // stored.
      x_at[n] = first_x + staged_at(min(t, place.tokens - 1), lane / 8);
      v_at[n] = first_v + staged_at(min(r, params.rank - 1), lane / 8);
      t += 8;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[tile][n][i] = 0.0f;
  }

  template <int kStep>
  __device__ __forceinline__ void add(const BlockOperands<Traits>& block, const uint32_t (&)[1][4],
                                      uint32_t slot) {
    uint32_t a[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) block.template load_signs<kStep>(a[tile], tile);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n > 0 && 8 * n >= columns) break;
      uint32_t x[4], v[4];
      load_matrices(x, slot + (x_at[n] ^ (kStep % 2 * 64)) + 128 * (kStep / 2));
      load_matrices(v, slot + (v_at[n] ^ (kStep % 2 * 64)) + 128 * (kStep / 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = T::multiply(x[i], v[i]);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        T::template mma_sparse<kStep % 2>(sum[tile][n], a[tile], x, block.pruned[tile][kStep / 2]);
    }
  }

  __device__ __forceinline__ void store(float* own, const LinearParams& params) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      store_columns(own, params, sum, n, params.tile_tokens + 8 * n, 0, columns - 8 * n);
  }
};

}  // namespace slab
