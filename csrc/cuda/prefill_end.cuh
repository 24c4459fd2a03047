// What follows a tile's products: bias and the store of y, or of a share of the sums.
//
// A share goes to a slot of `partial` as the threads hold it, [tokens / 8][threads that multiply]
// [4] floats, so that neighbours store side by side. prefill_reduce.cuh adds the shares.
#pragma once

#include "bias.cuh"
#include "hopper.cuh"
#include "prefill_place.cuh"
#include "prefill_traits.cuh"

namespace slab {

// The bias of rows g and g + 8 of a warp's 16, of which `first_row` is the first.
__device__ __forceinline__ void load_bias(float (&bias)[2], const PrefillParams& params,
                                          int first_row, int end_row, int lane) {
  const int row = first_row + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) bias[h] = row + 8 * h < end_row ? bias_of(params, row + 8 * h) : 0.0f;
}

// y of a warp's 16 rows and 16 tokens, from the sums c of two eights of tokens (wgmma.cuh). They
// are turned in `staging`, token by token, and stored in pieces of 8 rows.
template <class T>
__device__ __forceinline__ void store_tokens(const PrefillParams& params, uint32_t staging,
                                             const float (&c)[8], const float (&bias)[2],
                                             int first_row, int end_row, int first_token,
                                             int lane) {
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2 * 2;
    r[i] = T::pack(c[from] + bias[i % 2], c[from + 1] + bias[i % 2]);
  }
  __syncwarp();  // The tokens before have been read.
  // Lane l names token l % 8 of eight number l / 16, and of the first or second eight rows.
  store_matrices_transposed(
      staging + (lane / 16 * 8 + lane % 8) * kStagingPitch + lane / 8 % 2 * 16, r);
  __syncwarp();
  const int token = first_token + lane / 2, row = first_row + lane % 2 * 8;
  if (token >= params.tokens || row >= end_row) return;
  const uint32_t at = staging + lane / 2 * kStagingPitch + lane % 2 * 16;
  uint8_t* const to = params.y + 2 * (int64_t(token) * params.out_features + row);
  if (row + 8 <= end_row && (params.out_features | row) % 8 == 0) {
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
  const uint32_t staging = shared_base + Traits::kStagingAt + warp * kStagingBytes;
  const int first_row = place.first_row + kTileRows * warp;
  float bias[2];
  load_bias(bias, params, first_row, place.end_row, lane);
#pragma unroll
  for (int j = 0; j < Traits::kTokens / 8; j += 2) {
    const int token = place.first_token + 8 * j;
    if (token >= params.tokens) break;
    float c[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = sums[4 * j + i];
    store_tokens<typename Traits::Activation>(params, staging, c, bias, first_row, place.end_row,
                                              token, lane);
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
