// A stage of a K group's ring in wide.cuh, and what a warp copies into it.
//
// A stage holds one K-block. In bytes, with T the tokens of a CTA (params.tile_tokens) and R ranks:
//
//   0            x: T rows of 128 inputs, 256 bytes each
//   256 T        v: a row for each rank
//   256 (T + R)  weights: the blocks of warp_rows row pairs
//
// and at the end so much that its size is a multiple of 128, and at least 2048 bytes for each of
// the warp's token tiles, because whole tiles are read. (What stands where a token does not exist
// gets into its column of the products alone, which is not stored.) So a stage takes
//
//   max(2048 token tiles, 128 ceil((256 (T + R) + warp_rows x bytes of a block) / 128)) bytes.
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
  static constexpr uint32_t kLeast = 8 * kTokenRow * Traits::kTokenTiles;

  uint32_t v_at, weights_at, block_bytes;  // v_at and weights_at count from the start of a stage
  uint32_t bytes;

  __device__ __forceinline__ explicit WideStage(const LinearParams& params) {
    block_bytes = Traits::block_bytes(params.group_steps);
    v_at = params.tile_tokens * kTokenRow;
    weights_at = v_at + (Traits::kSigns ? params.rank * kTokenRow : 0);
    bytes = max(kLeast, (weights_at + params.warp_rows * block_bytes + 127) & ~127u);
  }
};

// The pieces of kTiles x 8 rows that a warp copies. A copy takes four pieces of eight rows, in the
// lanes that read them by ldmatrix, so the 16 pieces of a tile's rows take four copies at fixed
// distances. Up to four warps share the copies of a tile.
template <int kTiles>
struct RowCopies {
  const uint8_t* from;  // this lane's first piece, of K-block 0
  uint32_t next_tile;   // bytes from a row to the eighth after it
  uint32_t exist;       // bit 4 n + j: this lane takes part in copy j of tile n

  // Of rows `row_bytes` apart (eight of them below 4 GB), `rows` of which exist.
  __device__ __forceinline__ RowCopies(const uint8_t* first, uint32_t row_bytes, int rows,
                                       int member, int members) {
    const int row = threadIdx.x % 8;
    from = keep(first + uint64_t(uint32_t(row)) * row_bytes + threadIdx.x / 8 * 16);
    next_tile = 8 * row_bytes;
    const uint32_t own = members == 1   ? 0xFu
                         : members == 2 ? 0x3u << (2 * member)
                         : member < 4   ? 0x1u << member
                                        : 0;
    exist = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (row + 8 * n < rows) exist |= own << (4 * n);
  }

  // K-block k. to[0] and to[1]: where the lane reads even and odd steps by ldmatrix.
  __device__ __forceinline__ void fetch(const uint32_t (&to)[2], uint32_t k) const {
    const uint8_t* at[kTiles];
    find_tiles(at, k);
    copy<0>(at, to);
  }
  // The same of a K-block with fewer inputs than 128; zeros stand behind them.
  __device__ __forceinline__ void fetch_ragged(const uint32_t (&to)[2], uint32_t k,
                                               int inputs) const {
    const uint8_t* at[kTiles];
    find_tiles(at, k);
    copy_ragged<0>(at, to, inputs - 8 * int(threadIdx.x / 8));
  }

 private:
  __device__ __forceinline__ void find_tiles(const uint8_t* (&at)[kTiles], uint32_t k) const {
    at[0] = from + uint64_t(k) * kTokenRow;
#pragma unroll
    for (int n = 1; n < kTiles; ++n) at[n] = at[n - 1] + next_tile;
  }
  template <int kNumber>
  __device__ __forceinline__ void copy(const uint8_t* const (&at)[kTiles],
                                       const uint32_t (&to)[2]) const {
    constexpr int j = kNumber % 4, n = kNumber / 4;
    copy16_if_bit<kNumber, 8 * kTokenRow * n + 128 * (j / 2), 64 * j>(exist, to[j % 2], at[n]);
    if constexpr (kNumber + 1 < 4 * kTiles) copy<kNumber + 1>(at, to);
  }
  // left: inputs from this lane's first piece on.
  template <int kNumber>
  __device__ __forceinline__ void copy_ragged(const uint8_t* const (&at)[kTiles],
                                              const uint32_t (&to)[2], int left) const {
    constexpr int j = kNumber % 4, n = kNumber / 4;
    copy16_zero_filled_if<8 * kTokenRow * n + 128 * (j / 2), 64 * j>(
        exist & 1u << kNumber, to[j % 2], at[n], 2 * max(0, min(left - 32 * j, 8)));
    if constexpr (kNumber + 1 < 4 * kTiles) copy_ragged<kNumber + 1>(at, to, left);
  }
};

// v of the sign term, a row for each rank. The rows stand behind those of x.
template <class Traits, bool kAnyRank = Traits::kAnyRank>
struct FactorCopies {  // one row, copied by half a warp
  const uint8_t* from;
  bool yes;
  __device__ __forceinline__ FactorCopies(const LinearParams& params, const uint8_t* first,
                                          int member)
      : from(keep(first + 16 * threadIdx.x)), yes(member == 0 && threadIdx.x < 16) {}
  // to_weights: the lane's 16 bytes of the first block of weights, which follow.
  __device__ __forceinline__ void fetch(uint32_t to_weights, const uint32_t (&)[2],
                                        uint32_t k) const {
    copy16_if<-kTokenRow, 0>(yes, to_weights, from + uint64_t(k) * kTokenRow);
  }
};
template <class Traits>
struct FactorCopies<Traits, true> {
  RowCopies<2> rows;
  uint32_t behind_x;  // bytes from the first row of x
  __device__ __forceinline__ FactorCopies(const LinearParams& params, const uint8_t* first,
                                          int member)
      : rows(first, params.num_k_blocks * kTokenRow, params.rank, member, params.warp_rows),
        behind_x(params.tile_tokens * kTokenRow) {}
  __device__ __forceinline__ void fetch(uint32_t, const uint32_t (&to_x)[2], uint32_t k) const {
    rows.fetch({to_x[0] + behind_x, to_x[1] + behind_x}, k);
  }
};

// A warp's blocks of weights.
template <class Traits>
struct WideWeights {
  // Copies that every lane takes part in, and behind them one for some lanes.
  static constexpr int kWhole = Traits::kLeastBytes / 512;
  static constexpr bool kTail = Traits::kMostBytes > 512 * kWhole;
  static_assert(Traits::kMostBytes <= 512 * (kWhole + 1));
  // LDGSTS adds -2048 to 2047 to an address, so that one serves 4096 bytes.
  static constexpr int kReach = 2048;

  const uint8_t* from;  // this lane's first 16 bytes of the share's first K-block, + kReach
  uint32_t block_bytes;
  bool in_tail;
  uint64_t policy;

  __device__ __forceinline__ WideWeights(const LinearParams& params, const DecodePlace& place,
                                         int member) {
    const int lane = threadIdx.x;
    // Past the end of the part the last rows are read again; their sums are not stored.
    const int pair = min(place.first_pair + member, place.end_pair - 1);
    const uint32_t block = pair * params.num_k_blocks + place.first_k_block;
    block_bytes = Traits::block_bytes(params.group_steps);
    from = keep(params.stream + (uint64_t(block) * block_bytes + (16 * lane + kReach)));
    in_tail = 16 * lane < int(block_bytes) - 512 * kWhole;
    // Token tiles, where there are several, run side by side and find a weight in L2 all the same.
    // (A policy that is chosen at run time costs up to 17 instructions a block on sm_80.)
    policy = read_once_policy();
  }

  // K-block k. to: where the lane has its first 16 bytes in the stage.
  __device__ __forceinline__ void fetch(uint32_t to, uint32_t k) const {
    const uint8_t* const near = from + uint64_t(k) * block_bytes;
    const uint8_t* far = near;
    if constexpr (Traits::kMostBytes > 2 * kReach) far = keep(near + 2 * kReach);
    copy_whole<0>(to, near, far);
    if constexpr (kTail) copy<kWhole>(in_tail, to, near, far);
  }

 private:
  template <int kNumber>
  __device__ __forceinline__ void copy_whole(uint32_t to, const uint8_t* near,
                                             const uint8_t* far) const {
    copy<kNumber>(true, to, near, far);
    if constexpr (kNumber + 1 < kWhole) copy_whole<kNumber + 1>(to, near, far);
  }
  template <int kNumber>
  __device__ __forceinline__ void copy(bool yes, uint32_t to, const uint8_t* near,
                                       const uint8_t* far) const {
    constexpr int kAt = 512 * kNumber;
    if constexpr (kAt < 2 * kReach)
      copy16_if<kAt, kAt - kReach>(yes, to, near, policy);
    else
      copy16_if<kAt, kAt - 3 * kReach>(yes, to, far, policy);
  }
};

// What a warp copies of each K-block. to: where the lane has its 16 bytes of its block of weights,
// to_x[0] and to_x[1]: where it reads even and odd steps of x by ldmatrix, all of the stage.
template <class Traits>
struct WideCopies {
  WideWeights<Traits> weights;
  RowCopies<Traits::kTokenTiles> x;
  FactorCopies<Traits> v;
  int inputs;        // of the share
  int whole_blocks;  // of the share: K does not end in them

  __device__ __forceinline__ WideCopies(const WideWeights<Traits>& weights,
                                        const LinearParams& params, const DecodePlace& place,
                                        int member)
      : weights(weights),
        x(params.x + 2 * (place.first_token * params.token_stride +
                          int64_t(place.first_k_block) * kBlockInputs),
          2 * uint32_t(params.token_stride), place.tokens, member, params.warp_rows),
        v(params,
          params.v + uint64_t(uint32_t(place.part * params.rank * params.num_k_blocks +
                                       place.first_k_block)) *
                         kTokenRow,
          member) {
    const int first_input = place.first_k_block * kBlockInputs;
    inputs = min(params.in_features - first_input, place.k_blocks * kBlockInputs);
    // With any rank there is no register to spare.
    whole_blocks = Traits::kAnyRank ? inputs >> 7 : pin(inputs >> 7);
  }

  __device__ __forceinline__ void fetch_v(uint32_t to, const uint32_t (&to_x)[2],
                                          uint32_t k) const {
    if constexpr (Traits::kSigns) v.fetch(to, to_x, k);
  }
  __device__ __forceinline__ void fetch_x(const uint32_t (&to_x)[2], int k) const {
    if (k < whole_blocks)
      x.fetch(to_x, k);
    else
      x.fetch_ragged(to_x, k, inputs - k * kBlockInputs);
  }
  // All of K-block k, if there is one. (Each way has its own copies of everything: so there is one
  // run of them, and no other branch.)
  __device__ __forceinline__ void fetch(uint32_t to, const uint32_t (&to_x)[2], int k) const {
    if (k < whole_blocks) {
      weights.fetch(to, k), fetch_v(to, to_x, k);
      x.fetch(to_x, k);
    } else if (k * kBlockInputs < inputs) {
      weights.fetch(to, k), fetch_v(to, to_x, k);
      x.fetch_ragged(to_x, k, inputs - k * kBlockInputs);
    }
  }
};

}  // namespace slab
