// What follows the main loop: the adapter's product, the sums of the groups, and the one store.
#pragma once

#include "bias.cuh"
#include "warp.cuh"

namespace slab {

// sums += z P^T. The kernel before this one summed z = x Q; its K-steps are dealt to the groups in
// turn.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::add_adapter() {
  const Place place = place_of<Traits::kPairs>(params);
  const WarpRole role = role_of(params);
  const int padded_rank = 16 * params.adapter_steps, z_row = params.parts * padded_rank;
  const int64_t z_split = int64_t(z_row) * params.tokens;
  for (int step = role.group; step < params.adapter_steps; step += params.warp_inputs) {
    Weights a;
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      const int pair = min(place.first_pair + role.row_warp * Traits::kPairs + m / kBlockTiles,
                           place.end_pair - 1);
      const int64_t row_tile = kBlockTiles * pair + m % kBlockTiles;
      const uint8_t* const tile = params.adapter_p + (row_tile * params.adapter_steps + step) * 512;
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(tile) + role.lane);
      a[m][0] = words.x, a[m][1] = words.y, a[m][2] = words.z, a[m][3] = words.w;
    }
    const int first = place.token_tile * params.tile_tokens +
                      role.token_warp * Traits::kWarpTokens + role.lane / 4;
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n) {
      const int token = min(first + 8 * n, params.tokens - 1);
      const float* const z = params.adapter_z + int64_t(token) * z_row + place.part * padded_rank +
                             16 * step + 2 * (role.lane % 4);
      float near[2] = {0.0f, 0.0f}, far[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int split = 0; split < params.z_splits; ++split) {
        // A plain load, not through the read-only cache: z was written while this kernel ran.
        const volatile float* const from = z + split * z_split;
        near[0] += from[0], near[1] += from[1], far[0] += from[8], far[1] += from[9];
      }
      const uint32_t b0 = T::pack(near[0], near[1]), b1 = T::pack(far[0], far[1]);
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) T::mma_dense(sums.sum[m][n], a[m], b0, b1);
    }
  }
}

// Adds the groups' sums in their order and stores y, or this split's share of it. `shared` is the
// memory of the rings; it takes the sums as [group][token][row].
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::write_result(float* shared) {
  const Place place = place_of<Traits::kPairs>(params);
  const WarpRole role = role_of(params);
  const int rows = params.warp_rows * Traits::kWarpRows, all_tokens = params.tile_tokens;
  // Tokens 2 t of a fragment lie 8 banks apart and rows g one bank: its 32 lanes meet 32 banks.
  const int pitch = rows + 4;
  copies_wait_all();
  __syncthreads();  // No warp reads the rings any more.
  float* const own = shared +
                     (role.group * all_tokens + role.token_warp * Traits::kWarpTokens) * pitch +
                     role.row_warp * Traits::kWarpRows;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + 2 * (role.lane % 4) + i % 2,
                  row = kTileRows * m + i / 2 * 8 + role.lane / 4;
        own[token * pitch + row] = sums.sum[m][n][i];
      }
  __syncthreads();
  const int first = place.token_tile * all_tokens, tokens = min(all_tokens, params.tokens - first);
  const int row_bits = 31 - __clz(rows);  // warp_rows is a power of two
  const int thread = (role.group * role.members + role.member) * 32 + role.lane;
  for (int i = thread; i < tokens * rows; i += 32 * role.members * params.warp_inputs) {
    const int token = i >> row_bits, row = i & (rows - 1), feature = place.first_row + row;
    if (feature >= place.end_row) continue;
    float total = 0.0f;
    for (int group = 0; group < params.warp_inputs; ++group)
      total += shared[(group * all_tokens + token) * pitch + row];
    const int64_t to = int64_t(first + token) * params.out_features + feature;
    if (params.partial)
      params.partial[int64_t(place.split) * params.tokens * params.out_features + to] = total;
    else
      reinterpret_cast<uint16_t*>(params.y)[to] = T::narrow(total + bias_of(params, feature));
  }
}

}  // namespace slab
