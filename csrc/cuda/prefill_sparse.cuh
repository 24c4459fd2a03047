// The operands of the sparse products, kPrefillOne and kPrefillBoth: kept values and metadata as
// the stream has them, and for the signs +-u with the metadata of the pruned entries.
#pragma once

#include "hopper.cuh"
#include "prefill_factors.cuh"
#include "wgmma.cuh"

namespace slab {

template <class Traits>
struct SparseOperands {
  using T = typename Traits::Activation;
  static constexpr bool kSigns = Traits::kSigns;
  // Registers for the operands of so many steps. With four they may be made while the products of
  // the two steps before are on their way; the signs leave room for two.
  static constexpr int kBuffers = kSigns ? 2 : 4;
  static constexpr bool kMadeEarly = kBuffers > 2;

  uint32_t kept[kBuffers][4], sign[kSigns ? kBuffers : 1][4];
  uint32_t metadata[2], pruned[2];  // of two steps each
  uint32_t signs;
  uint32_t block, values_at, metadata_at, signs_at, scales_at;
  int scale_shift;
  PrefillRows<Traits> rows;
  PrefillKept<Traits> values;

  // Addresses are counted from a stage's first byte.
  __device__ __forceinline__ SparseOperands(const PrefillParams& params,
                                            const PrefillShared<Traits>& shared, int warp,
                                            int lane)
      : values(params.tokens) {
    const int tile = warp % kBlockTiles, pair_at = warp / kBlockTiles * shared.block_bytes;
    // Kept, or the compiler would derive them again in every K-block.
    values_at = keep(pair_at + tile * Traits::kTileBytes + 16 * lane);
    metadata_at = keep(pair_at + Traits::kMetadataAt + 16 * lane + 8 * tile);
    signs_at = keep(pair_at + Traits::kSignsAt + 8 * lane + 4 * tile);
    scales_at = keep(pair_at + Traits::kSignsAt + (kSigns ? kSignBytes : 0) + lane / 4 * 8 +
                     4 * tile);
    scale_shift = params.group_steps >> 1;
  }

  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    rows.begin(params, place, warp, lane);
  }

  __device__ __forceinline__ void open(uint32_t stage) { block = stage; }

  template <int kStep>
  __device__ __forceinline__ void make() {
    if constexpr (Traits::kScaled)  // kStep / group_steps, which is 1, 2 or 4
      rows.set_scales(load_shared32(block + scales_at + (kStep >> scale_shift) * kScaleBytes));
    if (kStep % 2 == 0) metadata[kStep / 2] = load_shared32(block + metadata_at + 2 * kStep);
    if (kSigns && kStep == 0) signs = load_shared32(block + signs_at);
    if (kSigns && kStep % 2 == 0) pruned[kStep / 2] = complement_nibbles(metadata[kStep / 2]);
    values.template load<kStep>(kept[kStep % kBuffers], block + values_at, rows);
    if constexpr (kSigns) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sign[kStep % kBuffers][i] = and_xor(signs << (4 * kStep + i), 0x80008000u, rows.u[i % 2]);
    }
  }

  // Nothing of it is made after this or before.
  template <int kStep>
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("" : "+r"(kept[kStep % kBuffers][i])::"memory");
      if constexpr (kSigns) asm volatile("" : "+r"(sign[kStep % kBuffers][i])::"memory");
    }
    asm volatile("" : "+r"(metadata[kStep / 2])::"memory");
    if constexpr (kSigns) asm volatile("" : "+r"(pruned[kStep / 2])::"memory");
  }

  // b: the descriptor of the stage's tokens.
  template <int kStep>
  __device__ __forceinline__ void multiply(float (&sums)[Traits::kTokens / 2], uint32_t b) {
    b += kStep % 2 * 4;
    Products<Traits::kTokens>::template sparse<kStep % 2>(T(), sums, kept[kStep % kBuffers], b,
                                                          metadata[kStep / 2]);
    if constexpr (kSigns)
      Products<Traits::kTokens>::template sparse<kStep % 2>(
          T(), sums, sign[kStep % kBuffers], b + Traits::kBoxBytes / 16, pruned[kStep / 2]);
  }
};

}  // namespace slab
