// W[rows, K] = S + sum_r (u_r v_r^T) * B from the stream, in the activations' type, for cuBLAS:
// where very many tokens share a weight, rebuilding it once is cheaper than two sparse products.
// The adapter is not in it. `params` describes one part of the weight, or some of its row pairs:
// `out_features` rows, which lie a multiple of 8 inputs apart in memory (`dense_pitch`).
//
// A warp rebuilds the two tiles of a block one after the other, 16 rows x 128 inputs each. Register
// i = 2 c + h of a lane is the kept pair of ONE group, row g + 8 h and group 8 step + 4 c + t; the
// group's nibble lies with lane 4 g + 2 (step % 2) + c. Four PRMT put a group into place, with
// selectors that a table gives by the nibble. (Entry by entry, by comparisons, rebuilding 28672 x
// 4096 took an H100 225 us instead of 131.)
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

__device__ __forceinline__ uint32_t read32(const uint8_t* p) {
  return __ldg(reinterpret_cast<const uint32_t*>(p));
}
__device__ __forceinline__ uint2 read64(const uint8_t* p) {
  return __ldg(reinterpret_cast<const uint2*>(p));
}
__device__ __forceinline__ uint4 read128(const uint8_t* p) {
  return __ldg(reinterpret_cast<const uint4*>(p));
}

// The PRMT selectors of a nibble, for positions 0 and 1 (low half) and 2 and 3 (high half).
// `values` takes the kept pair from the first operand, and pruned entries from the second, which
// holds them in their places. `orders` takes the halves of the first and the second pruned entry
// from the first operand, and zero, which is the second operand, where an entry is kept.
struct Selectors {
  uint32_t values, orders;
};
__device__ __forceinline__ Selectors selectors_of(uint32_t nibble) {
  const int first = first_position(nibble), second = second_position(nibble);
  Selectors to = {0, 0};
  int seen = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const bool kept = j == first || j == second;
    const uint32_t value = j == first ? 0x10u : j == second ? 0x32u : j % 2 ? 0x76u : 0x54u;
    const uint32_t order = kept ? 0x44u : seen == 0 ? 0x10u : 0x32u;
    to.values |= value << (8 * j), to.orders |= order << (8 * j);
    seen += !kept;
  }
  return to;
}

constexpr SLAB_HD int dense_pitch(int in_features) { return (in_features + 7) / 8 * 8; }

// Where things lie in a block. kAny: of any rank and planes, else of at most rank one and one
// plane.
template <int kValues, bool kAny>
struct DenseLayout {
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr int kValueBytes = stream_value_bytes(kValues);  // of a tile
  static constexpr int kMetadataAt = kBlockTiles * kValueBytes;
  // Pieces of 16 bytes that a lane reads of the values.
  static constexpr int kPieces = kValues == kW16 ? 4 : kValues == kI8 ? 2 : 1;

  int signs_at, scales_at, block_bytes;
  bool three;  // sign planes

  __device__ __forceinline__ DenseLayout(const LinearParams& params) {
    signs_at = kMetadataAt + stream_metadata_bytes(kValues);
    scales_at = signs_at + (params.rank ? (kAny ? params.planes : 1) * kSignBytes : 0);
    block_bytes = scales_at + stream_scale_bytes(kValues, kScaled ? params.group_steps : kSteps);
    three = kAny && params.planes == 3;
  }
};

// What lane 4 g + t holds of a tile of a block.
template <int kValues, bool kAny>
struct DenseLane {
  using Layout = DenseLayout<kValues, kAny>;

  uint32_t words[4 * Layout::kPieces];
  uint32_t metadata[2][4];  // [step % 2][2 c + step / 2], the lane's nibble lowest
  uint32_t signs[2] = {0, 0}, third = 0;

  __device__ __forceinline__ DenseLane(const LinearParams& params, const Layout& layout,
                                       const uint8_t* block, int tile, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < Layout::kPieces; ++i) {
      const uint4 r = read128(block + tile * Layout::kValueBytes + 512 * i + 16 * lane);
      words[4 * i] = r.x, words[4 * i + 1] = r.y, words[4 * i + 2] = r.z, words[4 * i + 3] = r.w;
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int holder = 4 * g + 2 * odd + c;
        const uint2 r = read64(block + Layout::kMetadataAt + 16 * holder + 8 * tile);
        metadata[odd][2 * c] = r.x >> (4 * t), metadata[odd][2 * c + 1] = r.y >> (4 * t);
      }
    if (params.rank) {
      const uint8_t* const at = block + layout.signs_at;
      if (kAny && params.planes > 1) {
        const uint2 r = read64(at + 16 * lane + 8 * tile);
        signs[0] = r.x, signs[1] = r.y;
        if (layout.three) third = read32(at + 2 * kSignBytes + 8 * lane + 4 * tile);
      } else {
        signs[0] = read32(at + 8 * lane + 4 * tile);
      }
    }
  }

  // The kept pairs of a step as register i = 2 c + h of an mma's A fragment, not yet scaled. (int4
  // codes are larger by powers of two, by which the stream's scales are smaller.)
  template <class T>
  __device__ __forceinline__ void load_kept(uint32_t (&a)[4], int step) const {
    if constexpr (kValues == kW16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words[4 * step + i];
    } else if constexpr (kValues == kI8) {
      T::from_int8(a[0], a[1], words[2 * step], T::kByteMagic);
      T::from_int8(a[2], a[3], words[2 * step + 1], T::kByteMagic);
    } else {
      T::from_int4(a, words[step], T::kNibbleMagic);
    }
  }

  // The levels of register i's two pruned entries.
  template <class T>
  __device__ __forceinline__ uint32_t levels(int step, int i, float top) const {
    const uint32_t index = signs[step / 2] >> (8 * (step % 2) + 2 * i);  // bits 0, 1 and 16, 17
    const uint32_t half = third >> (4 * step + i / 2 + 2 * (i % 2));     // bits 0 and 16
    return T::pack(top - float(index & 3u) - 0.5f * float(half & 1u),
                   top - float(index >> 16 & 3u) - 0.5f * float(half >> 16 & 1u));
  }
};

// The sign term's magnitude at four inputs, added up over any number of ranks. v is that of the
// first.
template <class T>
__device__ __forceinline__ void add_ranks(float (&sum)[4], const LinearParams& params, int row,
                                          const uint8_t* v) {
#pragma unroll 1
  for (int r = 0; r < params.rank; ++r) {
    const float u_r = T::widen(uint16_t(__ldg(params.u + row * params.rank + r)));
    const uint8_t* const v_r = v + int64_t(r) * params.num_k_blocks * kTokenRow;
    const uint32_t near = read32(v_r), far = read32(v_r + 4);
    sum[0] = fmaf(u_r, T::widen(uint16_t(near)), sum[0]);
    sum[1] = fmaf(u_r, T::widen(uint16_t(near >> 16)), sum[1]);
    sum[2] = fmaf(u_r, T::widen(uint16_t(far)), sum[2]);
    sum[3] = fmaf(u_r, T::widen(uint16_t(far >> 16)), sum[3]);
  }
}

// One tile of 16 rows x 128 inputs, by one warp.
template <class T, int kValues, bool kAny>
__device__ __forceinline__ void rebuild_tile(const LinearParams& params,
                                             const DenseLayout<kValues, kAny>& layout,
                                             const Selectors (&table)[16], int first_row,
                                             int k_block) {
  using Layout = DenseLayout<kValues, kAny>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = first_row + g;
  const int first_input = k_block * kBlockInputs, tile = first_row / kTileRows % kBlockTiles;
  const int64_t number = int64_t(first_row / kBlockRows) * params.num_k_blocks + k_block;
  const uint8_t* const block = params.stream + number * layout.block_bytes;
  const int pitch = dense_pitch(params.in_features);
  const float top = layout.three ? 1.75f : 1.5f;
  const DenseLane<kValues, kAny> own(params, layout, block, tile, lane);
  uint32_t u[2] = {0, 0};  // of rows g and g + 8
  if (!kAny && params.rank) {
    u[0] = __ldg(params.u + row * params.rank);
    u[1] = __ldg(params.u + (row + 8) * params.rank);
  }
  const int own_input = first_input + 4 * t;  // and others at fixed distances from it
  const uint8_t* const own_v = params.v + 2 * own_input;
  uint16_t* const near_to =
      reinterpret_cast<uint16_t*>(params.y) + int64_t(row) * pitch + own_input;
  uint16_t* const far_to = near_to + 8 * pitch;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4];
    own.template load_kept<T>(a, step);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int input = 32 * step + 16 * c;
      const uint8_t* const v = own_v + 2 * input;
      uint32_t v_low = 0, v_high = 0;
      if (!kAny && params.rank) v_low = read32(v), v_high = read32(v + 4);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * c + h;
        const Selectors at = table[own.metadata[step % 2][2 * c + step / 2] >> (16 * h) & 15];
        uint32_t kept = a[i];
        if constexpr (Layout::kScaled) {
          const int group = step >> (params.group_steps >> 1);  // step / group_steps: 1, 2 or 4
          const uint8_t* const scale =
              block + layout.scales_at + group * kScaleBytes + 8 * g + 4 * tile + 2 * h;
          const float s = widen_bf16(__ldg(reinterpret_cast<const uint16_t*>(scale)));
          kept = T::pack(s * T::widen(uint16_t(kept)), s * T::widen(uint16_t(kept >> 16)));
        }
        uint32_t low, high;  // what positions 0, 1 and 2, 3 hold if they are pruned
        if constexpr (kAny) {
          float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          add_ranks<T>(sum, params, row + 8 * h, v);
          if (params.planes > 1) {
            const uint32_t levels = own.template levels<T>(step, i, top);
            const uint32_t near = choose_bytes(levels, 0, at.orders);
            const uint32_t far = choose_bytes(levels, 0, at.orders >> 16);
            sum[0] *= T::widen(uint16_t(near)), sum[1] *= T::widen(uint16_t(near >> 16));
            sum[2] *= T::widen(uint16_t(far)), sum[3] *= T::widen(uint16_t(far >> 16));
          }
          low = T::pack(sum[0], sum[1]), high = T::pack(sum[2], sum[3]);
        } else {
          low = T::multiply(u[h], v_low), high = T::multiply(u[h], v_high);
        }
        if (!kAny || params.planes == 1) {
          // Bits 15 and 31 are the signs of the first and the second pruned entry.
          const uint32_t negative = own.signs[0] << (4 * step + i) & 0x80008000u;
          low ^= choose_bytes(negative, 0, at.orders);
          high ^= choose_bytes(negative, 0, at.orders >> 16);
        }
        if (row + 8 * h < params.out_features && own_input + input < params.in_features)
          *reinterpret_cast<uint2*>((h ? far_to : near_to) + input) = make_uint2(
              choose_bytes(kept, low, at.values), choose_bytes(kept, high, at.values >> 16));
      }
    }
  }
}

// The grid is (K-blocks, 8 for the warps of each CTA, row pairs). If there are fewer CTAs along rows
// than pairs, each goes on where the last one stopped.
template <class T, int kValues, bool kAny>
__device__ __forceinline__ void rebuild(const LinearParams& params) {
  let_successor_start();
  __shared__ Selectors table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = selectors_of(threadIdx.x);
  __syncthreads();
  wait_for_predecessor();  // It may still read W, as cuBLAS may that multiplied the rows before.
  const int k_block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (k_block >= params.num_k_blocks) return;
  const DenseLayout<kValues, kAny> layout(params);
  const int onward = gridDim.y * kBlockRows - kTileRows;  // from the second tile of a pair
  for (int row = blockIdx.y * kBlockRows; row < params.out_features;
       row += row % kBlockRows ? onward : kTileRows)
    rebuild_tile<T, kValues, kAny>(params, layout, table, row, k_block);
}

}  // namespace slab
