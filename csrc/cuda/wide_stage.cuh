// A stage of a K group's ring in wide.cuh, and what a warp copies into it.
//
// A stage holds one K-block. In bytes, with T the tokens of the CTA that exist:
//
//   0                 x: T rows of 128 inputs, 256 bytes each
//   256 T             v: a row for each rank
//   256 (T + rank)    weights: the blocks of warp_rows row pairs
//
// and at the end so much that its size is a multiple of 128: 128 ceil((256 (T + rank) + warp_rows x
// bytes of a block) / 128) bytes. The host counts with the tokens of the largest tile, min(M,
// tile_tokens).
//
// A row is 16 pieces of 16 bytes. Piece c of row r is stored at c ^ (r % 8), so that the eight rows
// of an ldmatrix lie in different banks.
#pragma once

#include "decode_place.cuh"
#include "wide_traits.cuh"

namespace slab {

// Where a row has a piece, from the first row. Both may be one of a lane's.
__device__ __forceinline__ uint32_t staged_at(int row, int piece) {
  return row * kTokenRow + ((piece ^ (row & 7)) << 4);
}

template <class Traits>
struct WideStage {
  uint32_t v_at, weights_at, block_bytes;  // v_at and weights_at count from the start of a stage
  uint32_t bytes;

  __device__ __forceinline__ WideStage(const LinearParams& params, const DecodePlace& place) {
    block_bytes = Traits::block_bytes(params.group_steps);
    v_at = place.tokens * kTokenRow;
    weights_at = v_at + (Traits::kSigns ? params.rank * kTokenRow : 0);
    bytes = (weights_at + params.warp_rows * block_bytes + 127) & ~127u;
  }
};

// Some of the warps that share a stage may be ahead of others. A barrier of one warp would take one
// of the CTA's 16 barriers for nothing.
__device__ __forceinline__ void meet_group(const LinearParams& params, int group) {
  if (params.warp_rows == 1)
    __syncwarp();
  else
    barrier(1 + group, 32 * params.warp_rows);
}

// The pieces of kTiles x 8 rows that a warp copies. A copy takes four pieces of eight rows, so a
// row's 16 pieces take four copies, at fixed distances; up to four warps share them, and more than
// four the tiles too.
template <int kTiles>
struct RowCopies {
  const uint8_t* from;  // this lane's first piece, of K-block 0
  uint32_t to[2];       // where even and odd copies of a tile put it
  uint32_t next_tile;   // bytes from a row to the eighth after it
  uint32_t exist;       // bit 4 n + j: copy j of tile n has a row in this lane
  int first_piece;

  // Rows `row_bytes` apart, `rows` of which exist, are copied to `to`, rows of kTokenRow bytes.
  __device__ __forceinline__ RowCopies(const uint8_t* first, uint32_t row_bytes, int rows,
                                       uint32_t shared, int member, int members) {
    const int lane = threadIdx.x;
    // Eight lanes that follow each other write two rows whose pieces lie in all 32 banks.
    const int row = (lane >> 3 & 3) + (lane & 4);
    const int copies = members == 1 ? 4 : members == 2 ? 2 : 1;
    first_piece = 4 * (member * copies & 3) + lane % 4;
    from = keep(first + uint64_t(uint32_t(row)) * row_bytes + 16 * first_piece);
    to[0] = shared + staged_at(row, first_piece), to[1] = to[0] ^ 64;
    next_tile = 8 * row_bytes;
    exist = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (row + 8 * n < rows && (members <= 4 || member / 4 == n))
        exist |= ((1u << copies) - 1) << (4 * n);
  }

  template <int kNumber>
  __device__ __forceinline__ void copy(uint32_t which, const uint8_t* const (&at)[kTiles],
                                       uint32_t slot) const {
    constexpr int j = kNumber % 4, n = kNumber / 4;
    copy16_if<2048 * n + 128 * (j / 2), 64 * j>(which & 1u << kNumber, slot + to[j % 2], at[n]);
    if constexpr (kNumber + 1 < 4 * kTiles) copy<kNumber + 1>(which, at, slot);
  }
  __device__ __forceinline__ void fetch(uint32_t slot, uint32_t k, bool yes) const {
    const uint8_t* at[kTiles];
    at[0] = from + uint64_t(k) * kTokenRow;
#pragma unroll
    for (int n = 1; n < kTiles; ++n) at[n] = at[n - 1] + next_tile;
    copy<0>(yes ? exist : 0, at, slot);
  }

  // `left` inputs exist from this lane's first piece on; zeros stand behind them.
  __device__ __forceinline__ void fetch_at_edge(uint32_t slot, uint32_t k, int left) const {
    const uint8_t* at = from + uint64_t(k) * kTokenRow;
#pragma unroll 1
    for (int n = 0; n < kTiles; ++n, at += next_tile)
#pragma unroll 1
      for (int j = 0; j < 4; ++j)
        copy16_zero_filled(exist >> (4 * n + j) & 1,
                           slot + (to[0] ^ (j % 2 * 64)) + 2048 * n + 128 * (j / 2), at + 64 * j,
                           2 * max(0, min(left - 32 * j, 8)));
  }
};

// What a warp copies of each K-block.
template <class Traits>
struct WideCopies {
  // Copies of weights that every lane takes part in, and behind them one for some lanes.
  static constexpr int kWhole = Traits::kLeastBytes / 512;
  static constexpr bool kTail = Traits::kMostBytes > 512 * kWhole;
  static_assert(Traits::kMostBytes <= 512 * (kWhole + 1));

  const uint8_t* weights;  // this lane's first 16 bytes of the share's first K-block
  uint32_t weights_to, block_bytes;
  bool in_tail;
  uint64_t policy;
  RowCopies<Traits::kTokenTiles> x;
  const uint8_t* v;
  uint32_t v_to;
  bool has_v;
  int whole_blocks;
  int in_features;
  __device__ __forceinline__ WideCopies(const LinearParams& params, const DecodePlace& place,
                                        const WideStage<Traits>& stage, uint32_t ring, int member)
      : x(params.x + 2 * (place.first_token * params.token_stride +
                          int64_t(place.first_k_block) * kBlockInputs),
          2 * uint32_t(params.token_stride), place.tokens, ring, member, params.warp_rows) {
    const int lane = threadIdx.x;
    // Past the end of the part the last rows are read again; their sums are not stored.
    const int pair = min(place.first_pair + member, place.end_pair - 1);
    block_bytes = stage.block_bytes;
    weights = keep(
        params.stream +
        uint64_t(uint32_t(pair * params.num_k_blocks + place.first_k_block)) * block_bytes +
        16 * lane);
    weights_to = ring + stage.weights_at + member * block_bytes + 16 * lane;
    in_tail = lane < (int(block_bytes) - 512 * kWhole) / 16;
    policy = weight_policy(params.token_tiles == 1);
    v = keep(
        params.v +
        uint64_t(uint32_t(place.part * params.num_k_blocks + place.first_k_block)) * kTokenRow +
        16 * lane);
    v_to = ring + stage.v_at + 16 * lane;
    has_v = member == 0 && lane < 16;
    in_features = params.in_features - place.first_k_block * kBlockInputs;
    whole_blocks = in_features >> 7;
  }

  template <int kNumber>
  __device__ __forceinline__ void fetch_whole(uint32_t to, const uint8_t* from) const {
    copy16_if<512 * kNumber>(true, to, from, policy);
    if constexpr (kNumber + 1 < kWhole) fetch_whole<kNumber + 1>(to, from);
  }
  __device__ __forceinline__ void fetch_weights(uint32_t slot, uint32_t k) const {
    const uint8_t* const from = weights + uint64_t(k) * block_bytes;
    fetch_whole<0>(slot + weights_to, from);
    if constexpr (kTail) copy16_if<512 * kWhole>(in_tail, slot + weights_to, from, policy);
    if constexpr (Traits::kSigns) copy16_if<0, 0>(has_v, slot + v_to, v + uint64_t(k) * kTokenRow);
  }
  __device__ __forceinline__ void fetch_activations(uint32_t slot, int k) const {
    x.fetch(slot, k, k < whole_blocks);
    if (k >= whole_blocks)
      x.fetch_at_edge(slot, k, in_features - k * kBlockInputs - 8 * x.first_piece);
  }
};

}  // namespace slab
