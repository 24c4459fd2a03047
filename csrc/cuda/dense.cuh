// W[N,K] = S + sum_r (u_r v_r^T) * B from the stream, in the activations' type: for cuBLAS, where so many tokens share
// a weight that rebuilding it once is cheaper than two sparse products, and for gradients. The adapter is not in it.
//
// A warp rebuilds one block (16 rows x 128 inputs). Register i = 2 c + h of a lane is the kept pair of ONE group: row
// g + 8 h, group 8 step + 4 c + t; its nibble lies with lane 4 g + 2 (step % 2) + c. Bound by the store of 2 bytes a
// weight.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

__device__ __forceinline__ uint32_t read32(const uint8_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }

template <class T, int kValues, bool kPlanes>  // kPlanes: two or three, else one
__device__ __forceinline__ void rebuild(const LinearParams& p) {
  constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int signs_at = stream_value_bytes(kValues) + stream_metadata_bytes(kValues);
  const int scales_at = signs_at + (p.rank ? (kPlanes ? p.planes : 1) * kSignBytes : 0);
  const int block_bytes = scales_at + stream_scale_bytes(kValues, kScaled ? p.group_steps : kSteps);
  const int warps = gridDim.x * (blockDim.x / 32), blocks = p.part_block[p.parts] * p.k_blocks;
  for (int b = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; b < blocks; b += warps) {
    const int row_block = b / p.k_blocks, k_block = b % p.k_blocks;
    int part = 0;
    for (int i = 1; i < p.parts; ++i)
      if (row_block >= p.part_block[i]) part = i;
    const uint8_t* const block = p.stream + int64_t(b) * block_bytes;
    uint32_t signs = !kPlanes && p.rank ? read32(block + signs_at + 4 * lane) : 0;
    const uint32_t third = kPlanes && p.planes == 3 ? read32(block + signs_at + 2 * kSignBytes + 4 * lane) : 0;
    const float top = p.planes == 3 ? 1.75f : 1.5f;
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kPlanes) signs = read32(block + signs_at + 8 * lane + 4 * (step / 2));
      uint32_t a[4];
      if constexpr (kValues == kW16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = read32(block + 512 * step + 16 * lane + 4 * i);
      } else if constexpr (kValues == kI8) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t w = read32(block + step / 2 * 512 + 16 * lane + step % 2 * 8 + 4 * c);
          T::from_int8(a[2 * c], a[2 * c + 1], w, T::kByteMagic);
        }
      } else {
        T::from_int4(a, read32(block + 16 * lane + 4 * step), T::kNibbleMagic);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = i / 2, h = i % 2, row = 8 * h + g, input = k_block * kBlockInputs + 32 * step + 16 * c + 4 * t;
        const int feature = p.part_row[part] + (row_block - p.part_block[part]) * kBlockRows + row;
        if (feature >= p.part_row[part + 1] || input >= p.in_features) continue;
        const uint32_t word =
            read32(block + stream_value_bytes(kValues) + 8 * (4 * g + 2 * (step % 2) + c) + step / 2 * 4);
        const uint32_t nibble = word >> (16 * h + 4 * t);
        float kept[2] = {T::widen(uint16_t(a[i])), T::widen(uint16_t(a[i] >> 16))};
        if constexpr (kScaled) {
          const uint8_t* const scale = block + scales_at + step / p.group_steps * 2 * kBlockRows + 4 * g + 2 * h;
          const float s = widen_bf16(__ldg(reinterpret_cast<const uint16_t*>(scale)));
          kept[0] *= s, kept[1] *= s;
        }
        float pruned[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int r = 0; r < p.rank; ++r) {
          const float u = T::widen(uint16_t(__ldg(p.u + int64_t(row_block * kBlockRows + row) * p.rank + r)));
          const uint8_t* const v = p.v + 2 * (int64_t(part * p.rank + r) * p.k_blocks * kBlockInputs + input);
          const uint32_t low = read32(v), high = read32(v + 4);
          pruned[0] = fmaf(u, T::widen(uint16_t(low)), pruned[0]);
          pruned[1] = fmaf(u, T::widen(uint16_t(low >> 16)), pruned[1]);
          pruned[2] = fmaf(u, T::widen(uint16_t(high)), pruned[2]);
          pruned[3] = fmaf(u, T::widen(uint16_t(high >> 16)), pruned[3]);
        }
        const int first = first_position(nibble), second = second_position(nibble);
        const uint32_t negative = signs << (4 * step + i);         // bit 15: first pruned entry, bit 31: second
        const uint32_t index = signs >> (8 * (step % 2) + 2 * i);  // of two planes: bits 0, 1 and 16, 17
        const uint32_t half = third >> (4 * step + c + 2 * h);     // bits 0 and 16
        uint16_t w[4];
        bool seen = false;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j == first) {
            w[j] = T::narrow(kept[0]);
          } else if (j == second) {
            w[j] = T::narrow(kept[1]);
          } else {
            const int up = seen ? 16 : 0;
            if constexpr (kPlanes)
              w[j] = T::narrow((top - float(index >> up & 3u) - 0.5f * float(half >> up & 1u)) * pruned[j]);
            else
              w[j] = T::narrow((negative & (0x8000u << up)) ? -pruned[j] : pruned[j]);
            seen = true;
          }
        }
        uint16_t* const to = reinterpret_cast<uint16_t*>(p.y) + int64_t(feature) * p.in_features + input;
        if (p.in_features % kGroup == 0) {
          *reinterpret_cast<uint2*>(to) = make_uint2(w[0] | uint32_t(w[1]) << 16, w[2] | uint32_t(w[3]) << 16);
        } else {
          for (int j = 0; j < 4; ++j)
            if (input + j < p.in_features) to[j] = w[j];
        }
      }
    }
  }
}

}  // namespace slab
