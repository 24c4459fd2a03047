// The producer: what a warp copies from global memory into a stage of the ring, 16 bytes a lane at
// a time and asynchronously (cp.async). Copies are predicated, never branched around.
#pragma once

#include "warp.cuh"

namespace slab {

// Starts the copies of a K-block's weights and rows of v. They may be read before the kernel before
// this one has ended, activations may not.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_weights(int k_block) const {
  // Derived from tail_pieces, so that only one of the two numbers stays in a register.
  const uint32_t block_bytes = 16 * copy.tail_pieces + Traits::kHeadBytes;
  const uint8_t* const v_from = copy.v_from + uint64_t(uint32_t(k_block)) * kTokenRow;
#pragma unroll
  for (int p = 0; p < Traits::kPairs; ++p) {
    if (!copy.has_block[p]) continue;
    const uint32_t to = write_stage + copy.weights_to[p];
    // Unsigned, this is one multiply-add into the register pair that LDGSTS takes.
    const uint8_t* const from = copy.weights_from[p] + uint64_t(uint32_t(k_block)) * block_bytes;
    // Conditional copies come first: then ptxas predicates them instead of branching around them.
    if constexpr (Traits::kSparse &&
                  (Traits::kScaled || Traits::kPlanes == 1 || Traits::kThirdPlane))
      copy16_if<Traits::kHeadBytes - Traits::kCopyFrom>(role.lane < copy.tail_pieces, to, from,
                                                        copy.l2_policy);
    if constexpr (Traits::kLongTail)
      copy16_if<Traits::kHeadBytes - Traits::kCopyFrom + 512>(role.lane + 32 < copy.tail_pieces, to,
                                                              from, copy.l2_policy);
    if (Traits::kRank == kRankOne && p == 0)
      copy16_if(copy.token_row == 0, write_stage + copy.v_to, v_from);
    fetch_head<0>(to, from);
  }
  if (Traits::kSparse && Traits::kRank == kRankAny)
    for (int r = copy.token_row; r < rank; r += copy.token_step)
      copy16_if(true, write_stage + copy.v_to + r * kTokenRow,
                v_from + r * params.num_k_blocks * kTokenRow);
}

// Copies the head of a block from byte kAt on.
template <class Traits>
template <int kAt>
__device__ __forceinline__ void Warp<Traits>::fetch_head(uint32_t to, const uint8_t* from) const {
  copy16_if<kAt - Traits::kCopyFrom>(true, to, from, copy.l2_policy);
  if constexpr (kAt + 512 < Traits::kHeadBytes) fetch_head<kAt + 512>(to, from);
}

// Starts the copies of a K-block's activations.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_activations(int k_block) const {
  const uint8_t* const from = copy.tokens_from + uint64_t(uint32_t(k_block)) * kTokenRow;
  const int left = copy.inputs - k_block * kBlockInputs;
  if (left >= kBlockInputs)
    Traits::kRebuilds ? fetch_own_rows(from) : fetch_whole_activations(from);
  else
    fetch_activations_at_edge(from, left);
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_whole_activations(const uint8_t* from) const {
  constexpr int kUnroll = 4;
  const uint32_t to = write_stage + copy.token_row * kTokenRow +
                      (16 * copy.token_piece ^ Traits::swizzle(copy.token_row));
  if (tokens <= copy.token_step) return copy16_if(copy.token_row < tokens, to, from);
  const int64_t step = 2 * copy.token_step * params.token_stride;
  for (int first = 0; first < tokens; first += kUnroll * copy.token_step) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j, from += step) {
      // token_step is a power of two above token_row, so their bits do not overlap: the swizzle of
      // their sum is that of token_row with the bits of `row` flipped.
      const int row = first + j * copy.token_step;
      copy16_if(row + copy.token_row < tokens, (to ^ Traits::swizzle(row)) + row * kTokenRow, from);
    }
  }
}

// The rows of this warp alone, two at a time.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_own_rows(const uint8_t* from) const {
  constexpr int kRows = 2 * Traits::kTokenTiles;  // four warps take one trip
  uint32_t to = write_stage + copy.tokens_to;
#pragma unroll 1
  for (int row = 0; row < copy.own_rows; row += kRows, to += kRows * kTokenRow) {
    fetch_rows<0>(to, from, copy.own_rows - row - role.lane / 16);
    from += 2 * kRows * params.token_stride;
  }
}

// Copies rows kRow, kRow + 2, ... as far as there are more than this left.
template <class Traits>
template <int kRow>
__device__ __forceinline__ void Warp<Traits>::fetch_rows(uint32_t to, const uint8_t* from,
                                                         int left) const {
  const uint32_t two_rows = 4 * uint32_t(params.token_stride);
  copy16_if<kRow * kTokenRow, 0>(left > kRow, kRow % 4 ? to ^ Traits::swizzle(2) : to,
                                 kRow ? advance(from, kRow / 2, two_rows) : from);
  if constexpr (kRow + 2 < 2 * Traits::kTokenTiles) fetch_rows<kRow + 2>(to, from, left);
}

// The last K-block where K is no multiple of 128. `left` inputs of it exist; the others are zero.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fetch_activations_at_edge(const uint8_t* from,
                                                                        int left) const {
  const int own = max(0, min(left - int(copy.token_piece) * 8, 8));  // inputs of this lane's piece
  const int64_t step = own ? 2 * copy.token_step * params.token_stride : 0;
  if (!own) from = params.x;  // Zero bytes are read there.
  if constexpr (Traits::kRebuilds) {
    const int64_t two_rows = own ? 4 * params.token_stride : 0;
    uint32_t to = write_stage + copy.tokens_to;
    for (int row = role.lane / 16; row < copy.own_rows; row += 2, from += two_rows) {
      copy16_zero_filled(to, from, 2 * own);
      to = (to ^ Traits::swizzle(2)) + 2 * kTokenRow;
    }
    return;
  }
  for (int row = copy.token_row; row < tokens; row += copy.token_step, from += step)
    copy16_zero_filled(
        write_stage + row * kTokenRow + (16 * copy.token_piece ^ Traits::swizzle(row)), from,
        2 * own);
}

}  // namespace slab
