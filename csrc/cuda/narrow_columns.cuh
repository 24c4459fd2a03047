// The activations of narrow.cuh in shared memory, as the columns of one n8 tile: column t is x of
// token t, column T + r T + t is v_r x of token t, rounded to 16 bits. T is params.tile_tokens, the
// tokens that a CTA has room for, of which the last may not exist.
//
// They lie as [K-block of the share][column][128 inputs]. A row is 16 bytes longer than its inputs,
// so that eight of them lie in different banks.
#pragma once

#include "decode_place.cuh"

namespace slab {

constexpr int kMostColumns = 8;
constexpr int kColumnRow = kTokenRow + 16;

// 16 bytes each of up to four rows of x or v.
struct RowPieces {
  uint4 row[4];

  // Zeros where a row of those that are wanted does not exist.
  __device__ __forceinline__ void load(const uint8_t* from, int64_t row_bytes, int rows,
                                       int wanted) {
    row[0] = make_uint4(0, 0, 0, 0);
    if (rows > 0) row[0] = load_global(from);
    if (wanted == 1) return;
#pragma unroll
    for (int j = 1; j < 4; ++j) {
      row[j] = make_uint4(0, 0, 0, 0);
      if (j < rows) row[j] = load_global(from + j * row_bytes);
    }
  }
};

template <class T>
__device__ __forceinline__ uint4 multiply(const uint4& a, const uint4& b) {
  return make_uint4(T::multiply(a.x, b.x), T::multiply(a.y, b.y), T::multiply(a.z, b.z),
                    T::multiply(a.w, b.w));
}

// Puts x and v_r x of the CTA's share of K into shared memory, zeros beyond K. A thread takes the
// same 16 bytes of every n-th K-block, its piece.
template <class Traits>
struct ColumnPieces {
  using T = typename Traits::Activation;

  const uint8_t *x, *v;  // of the first token and rank
  int64_t x_row, v_row;  // bytes from row to row
  uint32_t to;           // of the first column
  int k_block;           // of the share
  int left;              // inputs from this piece on; may be none
  int tile_tokens, tokens, rank;
  RowPieces x_rows, v_rows;

  __device__ __forceinline__ ColumnPieces(const LinearParams& params, const DecodePlace& place,
                                          uint32_t columns_at) {
    const int thread = threadIdx.x + 32 * (threadIdx.y + blockDim.y * threadIdx.z);
    tile_tokens = params.tile_tokens, tokens = place.tokens;
    rank = Traits::kSigns ? params.rank : 0;
    k_block = thread / 16;
    to = columns_at + k_block * k_block_bytes() + thread % 16 * 16;
    const int first_input = place.first_k_block * kBlockInputs + 8 * thread;
    left = params.in_features - first_input;
    x_row = 2 * params.token_stride, v_row = params.num_k_blocks * kTokenRow;
    x = params.x + place.first_token * x_row + 2 * int64_t(first_input);
    v = params.v + uint64_t(uint32_t(place.part * rank * params.num_k_blocks)) * kTokenRow +
        2 * int64_t(first_input);
  }

  __device__ __forceinline__ uint32_t k_block_bytes() const {
    return tile_tokens * (1 + rank) * kColumnRow;
  }
  // Waits for the predecessor, which may have written x, before it reads x.
  __device__ __forceinline__ void store(int k_blocks) {
    const int step = 2 * blockDim.y * blockDim.z;  // K-blocks that the CTA's threads take at once
    const uint32_t to_step = step * k_block_bytes();
    if constexpr (Traits::kSigns) load_v(k_block < k_blocks);
    wait_for_predecessor();
#pragma unroll 1
    for (int done = 0; done < k_blocks; done += step) {
      const bool exists = k_block < k_blocks;
#pragma unroll 1
      for (int first = 0; first < tile_tokens; first += 4) {
        x_rows.load(x + first * x_row, x_row, exists && left >= 8 ? tokens - first : 0,
                    tile_tokens - first);
        if (exists) store_x(first);
      }
      if constexpr (Traits::kSigns)
        if (exists) store_products();
      if (exists && 0 < left && left < 8) fill_ragged();
      x += step * kTokenRow, v += step * kTokenRow, to += to_step;
      k_block += step, left -= step * kBlockInputs;
      if constexpr (Traits::kSigns) load_v(k_block < k_blocks);
    }
  }

 private:
  __device__ __forceinline__ void load_v(bool exists) {
    v_rows.load(v, v_row, exists ? rank : 0, rank);
  }
  __device__ __forceinline__ void store_x(int first) const {
    const uint32_t at = to + first * kColumnRow;
    store_shared(at, x_rows.row[0]);
    if (tile_tokens == 1) return;
#pragma unroll
    for (int t = 1; t < 4; ++t)
      if (first + t < tile_tokens) store_shared(at + t * kColumnRow, x_rows.row[t]);
  }
  // With a rank no CTA has more than four tokens, and with more than four ranks only one.
  __device__ __forceinline__ void store_products() const {
    const uint32_t rank_step = tile_tokens * kColumnRow;
    store_shared(to + rank_step, multiply<T>(x_rows.row[0], v_rows.row[0]));
    if (tile_tokens * rank == 1) return;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (t + r > 0 && (t + 1) * (r + 2) <= kMostColumns && t < tile_tokens && r < rank)
          store_shared(to + (1 + r) * rank_step + t * kColumnRow,
                       multiply<T>(x_rows.row[t], v_rows.row[r]));
#pragma unroll 1
    for (int r = 4; r < rank; ++r)
      store_shared(to + (1 + r) * rank_step,
                   multiply<T>(x_rows.row[0], load_global(v + r * v_row)));
  }
  // The piece that K ends in, input by input. Zeros stand there.
  __device__ __forceinline__ void fill_ragged() const {
#pragma unroll 1
    for (int t = 0; t < tokens; ++t)
#pragma unroll 1
      for (int i = 0; i < left; ++i) {
        const uint32_t at = to + t * kColumnRow + 2 * i;
        const uint16_t value = reinterpret_cast<const uint16_t*>(x + t * x_row)[i];
        store_shared16(at, value);
#pragma unroll 1
        for (int r = 0; r < rank; ++r)
          store_shared16(at + tile_tokens * (1 + r) * kColumnRow,
                         T::multiply(value, reinterpret_cast<const uint16_t*>(v + r * v_row)[i]));
      }
  }
};

}  // namespace slab
