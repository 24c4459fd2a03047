// The end of the kernels for up to 16 tokens, narrow.cuh and wide.cuh: the adapter's product, the
// sums of the K groups, u, bias and the one store.
//
// The sums of a CTA lie in shared memory as [K group][column][row], in fp32. With T tokens a CTA
// (params.tile_tokens) and R ranks there are T (1 + R) columns: column t holds the kept values'
// sums of token t, column T + r T + t the sign term's of rank r and token t, without u. They take
// sums_pitch() floats a column, in the memory of the rings, so the host counts
//
//   warp_inputs x T (1 + R) x (32 warp_rows + 4) x 4 bytes.
//
// u of the CTA's rows stands in shared memory of its own, as [row][rank]: 32 warp_rows x R x 4
// bytes. A kernel ends so:
//
//   (before its loop)  fetch_factors(params, place, address of u);
//   if (params.adapter_steps && place.split == 0) add_adapter<T>(kept.sum, params, place);
//   copies_wait_all(); __syncthreads();              // no warp reads its ring any more
//   store_columns(...) for each tile of 8 columns    // its own columns of own_sums()
//   __syncthreads();
//   write_result<T>(params, sums, u);
//
// All sums are added in a fixed order: the groups', then u_r times the sign sum of each r.
#pragma once

#include "bias.cuh"
#include "decode_place.cuh"

namespace slab {

// Starts to copy u of the CTA's rows to shared memory; copies_wait_all() waits for it.
__device__ __forceinline__ void fetch_factors(const LinearParams& params, const DecodePlace& place,
                                              uint32_t to) {
  const int pairs = min(params.warp_rows, place.end_pair - place.first_pair);
  const int pieces = pairs * params.rank * (kBlockRows * 4 / 16);
  const uint32_t* const from = params.u + int64_t(place.first_pair) * kBlockRows * params.rank;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (; i < pieces; i += threads) copy16_if(true, to + 16 * i, from + 4 * i);
}

// Brings what the next linear reads first into L2, one line a thread; each CTA takes its share.
// Memory is idle while this kernel ends, and that of the next linear has not begun.
__device__ __forceinline__ void prefetch_next(const LinearParams& params) {
  constexpr int kLine = 128;
  if (!params.next) return;
  const int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int64_t step = int64_t(gridDim.x * gridDim.y * gridDim.z) * threads * kLine;
  int64_t at = (int64_t(cta) * threads + thread) * kLine;
#pragma unroll 1
  for (; at < params.next_bytes; at += step) prefetch_l2(params.next + at);
}

// sum += z P^T for the tokens of every token tile. The kernel before this one summed z = x Q; its
// K-steps are dealt to the K groups in turn. Columns of tokens that do not exist repeat the last.
template <class T, int kTiles>
__device__ __forceinline__ void add_adapter(float (&sum)[2][kTiles][4], const LinearParams& params,
                                            const DecodePlace& place) {
  const int lane = threadIdx.x;
  const int padded_rank = 16 * params.adapter_steps, z_row = params.parts * padded_rank;
  const int64_t z_split = int64_t(z_row) * params.tokens;
  const int pair = min(place.first_pair + int(threadIdx.y), place.end_pair - 1);
#pragma unroll 1
  for (int step = threadIdx.z; step < params.adapter_steps; step += params.warp_inputs) {
    uint32_t a[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint8_t* const from =
          params.adapter_p + (int64_t(2 * pair + tile) * params.adapter_steps + step) * 512;
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from) + lane);
      a[tile][0] = words.x, a[tile][1] = words.y, a[tile][2] = words.z, a[tile][3] = words.w;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int token = place.first_token + min(8 * n + lane / 4, place.tokens - 1);
      const float* const z = params.adapter_z + int64_t(token) * z_row + place.part * padded_rank +
                             16 * step + 2 * (lane % 4);
      float near[2] = {0.0f, 0.0f}, far[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int split = 0; split < params.z_splits; ++split) {
        // A plain load, not through the read-only cache: z was written while this kernel ran.
        const volatile float* const from = z + split * z_split;
        near[0] += from[0], near[1] += from[1], far[0] += from[8], far[1] += from[9];
      }
      const uint32_t b0 = T::pack(near[0], near[1]), b1 = T::pack(far[0], far[1]);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) T::mma_dense(sum[tile][n], a[tile], b0, b1);
    }
  }
}

// Floats from one column of the sums to the next. Columns 2 t of a fragment then lie 8 banks apart
// and rows g one bank: its 32 lanes meet 32 banks.
__device__ __forceinline__ int sums_pitch(const LinearParams& params) {
  return params.warp_rows * kBlockRows + 4;
}

// Where this warp's rows of its K group's first column are. columns: T (1 + R).
__device__ __forceinline__ float* own_sums(float* sums, const LinearParams& params, int columns) {
  return sums + threadIdx.z * columns * sums_pitch(params) + threadIdx.y * kBlockRows;
}

// Stores the columns [begin, end) of tile n's eight, column c as column first + c.
template <int kTiles>
__device__ __forceinline__ void store_columns(float* own, const LinearParams& params,
                                              const float (&sum)[2][kTiles][4], int n, int first,
                                              int begin, int end) {
  const int lane = threadIdx.x, pitch = sums_pitch(params);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const int column = 2 * (lane % 4) + odd;
    if (column < begin || column >= end) continue;
    float* const to = own + (first + column) * pitch + lane / 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to[tile * kTileRows + half * 8] = sum[tile][n][2 * half + odd];
  }
}

// The sum over the K groups, in their order. `column` points to the first group's.
__device__ __forceinline__ float sum_of_groups(const float* column, int groups, int group_floats) {
  float total = *column;
#pragma unroll 4
  for (int group = 1; group < groups; ++group) total += column[group * group_floats];
  return total;
}

// y, or this split's share of it without the bias. u: [row][rank] in shared memory.
template <class T>
__device__ __forceinline__ void write_result(const LinearParams& params, const float* sums,
                                             const uint32_t* u) {
  const DecodePlace place = decode_place(params);
  const int row = threadIdx.y * kBlockRows + threadIdx.x, feature = place.first_row + row;
  if (feature >= place.end_row) return;
  const int pitch = sums_pitch(params);
  const int group_floats = params.tile_tokens * (1 + params.rank) * pitch;
  for (int token = threadIdx.z; token < place.tokens; token += params.warp_inputs) {
    const float* column = sums + token * pitch + row;
    float total = sum_of_groups(column, params.warp_inputs, group_floats);
#pragma unroll 1
    for (int r = 0; r < params.rank; ++r) {
      column += params.tile_tokens * pitch;
      const float signs = sum_of_groups(column, params.warp_inputs, group_floats);
      total = fmaf(T::widen(uint16_t(u[row * params.rank + r])), signs, total);
    }
    const int64_t to = int64_t(place.first_token + token) * params.out_features + feature;
    if (params.partial)
      params.partial[int64_t(place.split) * params.tokens * params.out_features + to] = total;
    else
      reinterpret_cast<uint16_t*>(params.y)[to] = T::narrow(total + bias_of(params, feature));
  }
}

}  // namespace slab
