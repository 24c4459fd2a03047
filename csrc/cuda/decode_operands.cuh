// The A operands of the kernels for up to 16 tokens, narrow.cuh and wide.cuh: what a warp takes
// from a block of the stream (32 output rows x 128 inputs) in shared memory, one step of 32 inputs
// after the other, and the products of its kept values.
//
// Both kernels go through a block in this way, `tile` being a row tile of 16 rows:
//
//   BlockOperands<Traits> block(params.tokens, lane);      // once: constants in registers
//   KeptSums<Traits, token tiles> kept;  kept.clear();     // once
//   block.open(first byte of the block + 16 lane);
//   for step in 0 .. 3:                                    // template argument
//     b = the activations' fragments
//     for tile in 0, 1:
//       kept.multiply<step>(block, tile, b);               // all token tiles
//       block.load_signs<step>(a, tile);                   // +-1, or the level of several planes
//       for each tile of sign columns: T::mma_sparse<step % 2>(signs[tile][n], a,
//                                                       its fragment, block.pruned[tile][step / 2])
//     kept.end_step<step>(block, group_steps);             // scales
//
// So every kernel adds up the same products in the same order, and a token's result does not
// depend on which of them serves it.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

// A step as an argument's type.
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// Scale groups of 32, 64 or 128 inputs, known at run time only.
constexpr int kGroupStepsAny = 0;

// kPlanes_: sign planes, 0 without a sign term. kGroupSteps_: steps that a scale covers, 4 or
// kGroupStepsAny; without scales 4.
template <class Activation_, int kValues_, int kPlanes_, int kGroupSteps_>
struct DecodeTraits {
  using Activation = Activation_;
  static constexpr int kValues = kValues_, kPlanes = kPlanes_, kGroupSteps = kGroupSteps_;
  static constexpr bool kSparse = kValues != kDense;
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr bool kSigns = kPlanes > 0;
  static_assert(kGroupSteps == kSteps || (kGroupSteps == kGroupStepsAny && kScaled));
  static_assert(kSparse || !kSigns);

  // Where the parts of a block begin.
  static constexpr int kTileBytes = stream_value_bytes(kValues);  // values of a row tile
  static constexpr int kMetadataAt = 2 * kTileBytes;
  static constexpr int kSignsAt = kMetadataAt + stream_metadata_bytes(kValues);
  static constexpr int kThirdPlaneAt = kSignsAt + 2 * kSignBytes;
  static constexpr int kScalesAt = kSignsAt + kPlanes * kSignBytes;
  // Bytes of a block: with scale groups of 128 inputs, and of 32 inputs if they are not known.
  static constexpr int kLeastBytes = kScalesAt + stream_scale_bytes(kValues, kSteps);
  static constexpr int kMostBytes =
      kScalesAt + stream_scale_bytes(kValues, kGroupSteps == kSteps ? kSteps : 1);

  static __device__ __forceinline__ int block_bytes(int group_steps) {
    if constexpr (kGroupSteps == kSteps) return kMostBytes;
    // A shift, because group_steps is 1, 2 or 4.
    return kScalesAt + (kSteps * kScaleBytes >> (group_steps >> 1));
  }
};

// The operands of one block, and the constants that make them.
template <class Traits>
struct BlockOperands {
  using T = typename Traits::Activation;
  static constexpr int kSignWords = Traits::kPlanes == 1 ? 1 : 2;  // of a row tile, of one load

  uint32_t at;           // of this lane's first 16 bytes
  uint32_t words[2][4];  // integer values: one load serves several steps
  uint32_t metadata[2][2], pruned[2][2];
  uint32_t signs[2][kSignWords], third[2];
  uint32_t scales[2];  // of rows g and g + 8 of each row tile, if the block has one scale group
  // Constants. Where this lane reads 8 bytes of each lane's, and the 8 bytes of its row g: counted
  // from `at`.
  uint32_t narrow_at, scales_at;
  uint32_t value_magic, sign_magic, minus_five;

  // A LOP3 takes one immediate operand. With the other constant in a register, which a number that
  // the compiler cannot know forces, mask and constant are applied by one instruction. The number
  // is added: ptxas would take an OR apart again.
  __device__ __forceinline__ BlockOperands(int never_negative, int lane) {
    const uint32_t zero = opaque_zero(never_negative);
    value_magic = (Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) + zero;
    sign_magic = (Traits::kPlanes == 1 ? T::kOne : T::kNibbleMagic) + zero;
    minus_five = zero - 5u;
    narrow_at = -8 * lane + zero;
    scales_at = lane / 4 * 8 - 16 * lane + zero;
  }

  // Loads what several steps use.
  __device__ __forceinline__ void open(uint32_t block) {
    at = block;
    if constexpr (Traits::kSparse) {
      uint32_t r[4];
      load_shared(r, at + Traits::kMetadataAt);
#pragma unroll
      for (int i = 0; i < 4; ++i) metadata[i / 2][i % 2] = r[i];
    }
    if constexpr (Traits::kPlanes == 1) {
      uint32_t r[2];
      load_shared(r, at + narrow_at + Traits::kSignsAt);
      signs[0][0] = r[0], signs[1][0] = r[1];
    } else if constexpr (Traits::kSigns) {
      uint32_t r[4];
      load_shared(r, at + Traits::kSignsAt);
#pragma unroll
      for (int i = 0; i < 4; ++i) signs[i / 2][i % 2] = r[i];
      if constexpr (Traits::kPlanes == 3)
        load_shared(third, at + narrow_at + Traits::kThirdPlaneAt);
    }
    if constexpr (Traits::kValues == kI4) {
      load_shared(words[0], at);
      load_shared(words[1], at + Traits::kTileBytes);
    }
    if constexpr (Traits::kScaled && Traits::kGroupSteps == kSteps)
      load_shared(scales, at + scales_at + Traits::kScalesAt);
    if constexpr (Traits::kSigns) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pruned[i / 2][i % 2] = complement_nibbles(metadata[i / 2][i % 2]);
    }
  }

  // The kept values of a step of 32 inputs as stored, integer codes as 16-bit numbers.
  template <int kStep>
  __device__ __forceinline__ void load_kept(uint32_t (&a)[4], int tile) {
    const uint32_t values = at + tile * Traits::kTileBytes;
    if constexpr (Traits::kValues == kW16) {
      load_shared(a, values + 512 * kStep);
    } else if constexpr (Traits::kValues == kI8) {
      if constexpr (kStep % 2 == 0) load_shared(words[tile], values + 256 * kStep);
      T::from_int8(a[0], a[1], words[tile][kStep % 2 * 2], value_magic);
      T::from_int8(a[2], a[3], words[tile][kStep % 2 * 2 + 1], value_magic);
    } else {
      T::from_int4(a, words[tile][kStep], value_magic);
    }
  }

  // +-1 for the pruned entries of a step, or with several planes their levels.
  template <int kStep>
  __device__ __forceinline__ void load_signs(uint32_t (&a)[4], int tile) const {
    if constexpr (Traits::kPlanes == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = and_or(signs[tile][0] << (4 * kStep + i), 0x80008000u, sign_magic);
    } else {
      a[0] = level<kStep, 0, 0>(tile), a[1] = level<kStep, 0, 1>(tile);
      a[2] = level<kStep, 1, 0>(tile), a[3] = level<kStep, 1, 1>(tile);
    }
  }

  // The levels of register i = 2 kColumn + kHalf, exactly: 3/2 (two planes) or 7/4 (three) less the
  // index, which is put into the mantissa at bit kAt. The third plane's bit goes right below it,
  // where it counts half a unit.
  template <int kStep, int kColumn, int kHalf>
  __device__ __forceinline__ uint32_t level(int tile) const {
    constexpr int kAt = T::kIndexAt + 2 * kHalf, kScale = 0x00010001 * (kAt << T::kMantissaBits);
    constexpr uint32_t kTop =
        Traits::kPlanes == 2 ? 0x00030003u << (kAt - 1) : 0x00070007u << (kAt - 2);
    const uint32_t index =
        shift_down<8 * (kStep % 2) + 4 * kColumn - T::kIndexAt>(signs[tile][kStep / 2]);
    uint32_t word = and_or(index, 0x00030003u << kAt, sign_magic);
    if constexpr (Traits::kPlanes == 3) {
      const uint32_t half = shift_down<4 * kStep + kColumn + 1 - T::kIndexAt>(third[tile]);
      word = and_or(half, 0x00010001u << (kAt - 1), word);
    }
    return T::fma(word, (T::kOne - kScale) | 0x80008000u, T::kNibbleMagic - kScale + kTop);
  }
};

// The fp32 sums of the kept values' products: [row tile][token tile][c0 .. c3 of the fragment].
template <class Traits, int kTiles>
struct KeptSums {
  using T = typename Traits::Activation;

  float sum[2][kTiles][4];
  float group[2][Traits::kScaled ? kTiles : 1][4];  // of the present scale group, without its scale

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[tile][n][i] = 0.0f;
  }

  // Adds the products of a row tile with the activations b of every token tile.
  template <int kStep>
  __device__ __forceinline__ void multiply(BlockOperands<Traits>& block, int tile,
                                           const uint32_t (&b)[kTiles][4]) {
    uint32_t a[4];
    if constexpr (!Traits::kSparse) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        load_shared(a, block.at + tile * Traits::kTileBytes + 1024 * kStep + 512 * h);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          T::mma_dense(sum[tile][n], a, b[n][2 * h], b[n][2 * h + 1]);
      }
      return;
    } else {
      block.template load_kept<kStep>(a, tile);
      const uint32_t metadata = block.metadata[tile][kStep / 2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if constexpr (!Traits::kScaled)
          T::template mma_sparse<kStep % 2>(sum[tile][n], a, b[n], metadata);
        else if constexpr (kStep == 0)  // A scale group starts from zero, which no register holds.
          T::template mma_sparse_from_zero<0>(group[tile][n], a, b[n], metadata);
        else
          T::template mma_sparse<kStep % 2>(group[tile][n], a, b[n], metadata);
      }
    }
  }

  // Where a scale group ends, adds its sums times the scale.
  template <int kStep>
  __device__ __forceinline__ void end_step(const BlockOperands<Traits>& block, int group_steps) {
    if constexpr (Traits::kScaled) {
      if constexpr (Traits::kGroupSteps == kSteps) {
        if constexpr (kStep == kSteps - 1) add_group(block.scales);
      } else if (kStep == kSteps - 1 || ((kStep + 1) & (group_steps - 1)) == 0) {
        uint32_t scales[2];
        // This is kStep / group_steps, because group_steps is 1, 2 or 4.
        const int number = kStep >> (group_steps >> 1);
        load_shared(scales, block.at + block.scales_at + Traits::kScalesAt + number * kScaleBytes);
        add_group(scales);
        if constexpr (kStep < kSteps - 1) clear_group();
      }
    }
  }

 private:
  __device__ __forceinline__ void add_group(const uint32_t (&scales)[2]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float near = __uint_as_float(scales[tile] << 16),
                  far = __uint_as_float(scales[tile] & 0xFFFF0000u);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[tile][n][i] = fmaf(i < 2 ? near : far, group[tile][n][i], sum[tile][n][i]);
    }
  }

  __device__ __forceinline__ void clear_group() {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) group[tile][n][i] = 0.0f;
  }
};

}  // namespace slab
