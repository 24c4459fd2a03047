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
  static constexpr int kIssues = 1;  // of a step

  uint32_t kept[kBuffers][4], sign[kSigns ? kBuffers : 1][4];
  uint32_t metadata[2], pruned[2];  // of two steps each
  uint32_t signs;
  uint32_t values_at, metadata_at, signs_at, scales_at;
  int scale_shift, lane;
  PrefillRows<Traits> rows;
  PrefillKept<Traits> values;

  // Addresses are those of the next stage.
  __device__ __forceinline__ SparseOperands(const PrefillParams& params,
                                            const PrefillShared<Traits>& shared, int warp, int lane)
      : lane(lane), values(params.tokens) {
    const int tile = warp % kBlockTiles;
    const uint32_t pair_at = shared.weights + warp / kBlockTiles * shared.block_bytes;
    values_at = pair_at + tile * Traits::kTileBytes + 16 * lane;
    metadata_at = pair_at + Traits::kMetadataAt + 16 * lane + 8 * tile;
    signs_at = pair_at + Traits::kSignsAt + 8 * lane + 4 * tile;
    scales_at = pair_at + Traits::kSignsAt + (kSigns ? kSignBytes : 0) + lane / 4 * 8 + 4 * tile;
    scale_shift = params.group_steps >> 1;
  }

  __device__ __forceinline__ bool is_first_lane() const { return lane == 0; }

  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    rows.begin(params, place, warp, lane);
  }

  __device__ __forceinline__ void open() {}
  __device__ __forceinline__ void move(uint32_t distance) {
    values_at += distance, metadata_at += distance;
    if constexpr (kSigns) signs_at += distance;
    if constexpr (Traits::kScaled) scales_at += distance;
  }

  template <int kStep, int kIssue>
  __device__ __forceinline__ void make() {
    rows.template load_scales<kStep>(scales_at, scale_shift);
    if (kStep % 2 == 0) metadata[kStep / 2] = load_shared32(metadata_at + 2 * kStep);
    if (kSigns && kStep == 0) signs = load_shared32(signs_at);
    if (kSigns && kStep % 2 == 0) pruned[kStep / 2] = complement_nibbles(metadata[kStep / 2]);
    values.template load<kStep>(values_at);
    uint32_t a[2];
    values.template convert<kStep, 0>(a, rows);
    kept[kStep % kBuffers][0] = a[0], kept[kStep % kBuffers][1] = a[1];
    values.template convert<kStep, 1>(a, rows);
    kept[kStep % kBuffers][2] = a[0], kept[kStep % kBuffers][3] = a[1];
    if constexpr (kSigns) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sign[kStep % kBuffers][i] =
            and_xor(signs << (4 * kStep + i), 0x80008000u, twice(rows.u, i % 2));
    }
  }

  // Nothing of it is made after this or before.
  template <int kStep, int kIssue>
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
  template <int kStep, int kIssue>
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
