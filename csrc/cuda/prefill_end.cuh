// What follows a tile's products: bias and the store of y, or of a share of the sums.
//
// A share goes to a slot of `partial` as the threads hold it, [tokens / 8][threads that multiply][4]
// floats, so that neighbours store side by side. prefill_reduce.cuh adds the shares.
#pragma once

#include "bias.cuh"
#include "hopper.cuh"
#include "prefill_place.cuh"
#include "prefill_traits.cuh"

namespace slab {

// 16 rows x 16 tokens of a warp, which lie in `staging` token by token, in pieces of 8 rows.
// first_row: of the warp.
template <class Traits>
__device__ __forceinline__ void store_staged(const PrefillParams& params, uint32_t staging,
                                             int first_row, int end_row, int first_token,
                                             int lane) {
  const int token = first_token + lane / 2, row = first_row + lane % 2 * 8;
  const uint32_t at = staging + lane / 2 * Traits::kStagingPitch + lane % 2 * 16;
  if (token >= params.tokens || row >= end_row) return;
  uint8_t* const to = params.y + 2 * (int64_t(token) * params.out_features + row);
  if (row + 8 <= end_row && (params.out_features | row) % 8 == 0) {
    uint32_t r[4];
    load_shared(r, at);
    *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8 && row + i < end_row; ++i)
      reinterpret_cast<uint16_t*>(to)[i] = uint16_t(load_shared16(at + 2 * i));
  }
}

template <class Traits>
__device__ __forceinline__ void store_tile(const PrefillParams& params, const PrefillPlace& place,
                                           const float (&sums)[Traits::kTokens / 2],
                                           uint32_t shared_base, int warp, int lane) {
  using T = typename Traits::Activation;
  const uint32_t staging = shared_base + Traits::kStagingAt + warp * Traits::kStagingBytes;
  const int first_row = place.first_row + kTileRows * warp, row = first_row + lane / 4;
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    bias[h] = row + 8 * h < place.end_row ? bias_of(params, row + 8 * h) : 0.0f;
  // Lane l names token l % 8 of the first or second eight (l / 16) and of the first or second eight
  // rows (l / 8 % 2).
  const uint32_t own =
      staging + (lane / 16 * 8 + lane % 8) * Traits::kStagingPitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int j = 0; j < Traits::kTokens / 8; j += 2) {
    const int token = place.first_token + 8 * j;
    if (token >= params.tokens) break;
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 4 * (j + i / 2) + i % 2 * 2;
      r[i] = T::pack(sums[c] + bias[i % 2], sums[c + 1] + bias[i % 2]);
    }
    store_matrices_transposed(own, r);
    __syncwarp();
    store_staged<Traits>(params, staging, first_row, place.end_row, token, lane);
    __syncwarp();
  }
}

template <class Traits>
__device__ __forceinline__ void store_share(const PrefillParams& params, int slot,
                                            const float (&sums)[Traits::kTokens / 2], int thread) {
  float4* const to = reinterpret_cast<float4*>(params.partial) +
                     int64_t(slot) * (Traits::kTokens / 8 * Traits::kConsumers) + thread;
#pragma unroll
  for (int j = 0; j < Traits::kTokens / 8; ++j)
    to[j * Traits::kConsumers] =
        make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
}

}  // namespace slab
