// The producer: what a warp copies from global memory into a stage of the ring, 16 bytes a lane at
// a time and asynchronously (cp.async). Copies are predicated, never branched around.
#pragma once

#include "warp.cuh"

namespace slab {

// Starts the copies of a K-block, counted from the group's first, into the next stage.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_to_shared(int k_block) {
  fetch_weights(k_block);
  const uint64_t along_k = uint64_t(uint32_t(k_block)) * kTokenRow;
  if (Traits::kRank == kRankOne)
    copy16_if(copy.token_row == 0, write_stage + copy.v_to, params.v + copy.v_from + along_k);
  if (k_block < copy.whole_blocks)
    fetch_activations(copy.tokens_from + along_k);
  else
    fetch_activations_at_edge(k_block, copy.tokens_from + along_k);
  if (Traits::kRank == kRankAny)
    for (int r = copy.token_row; r < rank; r += copy.token_step)
      copy16_if(true, write_stage + copy.v_to + r * kTokenRow,
                params.v + copy.v_from + along_k + r * params.num_k_blocks * kTokenRow);
  write_stage = ring.after(write_stage);
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_weights(int k_block) const {
  // Derived from tail_pieces, so that only one of the two numbers stays in a register.
  const uint32_t block_bytes = 16 * copy.tail_pieces + Traits::kHeadBytes;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    // Unsigned, this is one multiply-add into the register pair that LDGSTS takes.
    const uint8_t* const from = copy.weights_from[m] + uint64_t(uint32_t(k_block)) * block_bytes;
    fetch_head<0>(copy.has_block[m], write_stage + copy.weights_to[m], from);
    if constexpr (Traits::kSparse &&
                  (Traits::kScaled || Traits::kPlanes == 1 || Traits::kThirdPlane))
      copy16_if<Traits::kHeadBytes>(copy.has_block[m] && role.lane < copy.tail_pieces,
                                    write_stage + copy.weights_to[m], from, copy.l2_policy);
  }
}

// Copies the head of a block from byte kAt on.
template <class Traits>
template <int kAt>
__device__ __forceinline__ void Warp<Traits>::fetch_head(bool has_block, uint32_t to,
                                                         const uint8_t* from) const {
  copy16_if<kAt>(has_block, to, from, copy.l2_policy);
  if constexpr (kAt + 512 < Traits::kHeadBytes) fetch_head<kAt + 512>(has_block, to, from);
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_activations(const uint8_t* from) const {
  constexpr int kUnroll = 4;
  const uint32_t to =
      write_stage + copy.token_row * kTokenRow + ((copy.token_piece ^ (copy.token_row & 7)) << 4);
  if (tokens <= copy.token_step) return copy16_if(copy.token_row < tokens, to, from);
  const int64_t step = 2 * copy.token_step * params.token_stride;
  for (int first = 0; first < tokens; first += kUnroll * copy.token_step) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j, from += step) {
      // token_step is a power of two above token_row, so their bits do not overlap: the swizzle of
      // their sum is that of token_row with the bits of `row` flipped.
      const int row = first + j * copy.token_step;
      copy16_if(row + copy.token_row < tokens, (to ^ ((row & 7) << 4)) + row * kTokenRow, from);
    }
  }
}

// The last K-block where K is no multiple of 128, and every K-block where rows of x are not aligned
// to 16 bytes.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_activations_at_edge(
    int k_block, const uint8_t* tokens_from) const {
  // Inputs that exist from this lane's piece on. params.whole_blocks less copy.whole_blocks is the
  // group's first K-block.
  const int left = params.in_features -
                   (params.whole_blocks - copy.whole_blocks + k_block) * kBlockInputs -
                   role.lane % 16 * 8;
  const uint8_t* from = left > 0 ? tokens_from : params.x;
  for (int row = copy.token_row; row < tokens;
       row += copy.token_step, from += left > 0 ? 2 * copy.token_step * params.token_stride : 0) {
    const uint32_t to = write_stage + row * kTokenRow + ((copy.token_piece ^ (row & 7)) << 4);
    if (!params.x_ragged) {
      copy16_zero_filled(to, from, 2 * max(0, min(left, 8)));
    } else {
      uint32_t r[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < left)
          r[j / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[j]) << (16 * (j % 2));
      store_shared(to, r);
    }
  }
}

}  // namespace slab
