// What an instance of the fused linear is: the numbers that follow from its template arguments
// alone.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace slab {

// How many ranks the sign term has. kRankAny: a number, 0 included, that is known at run time only.
constexpr int kRankNone = 0, kRankOne = 1, kRankAny = -1;
// Two or three sign planes, known at run time only.
constexpr int kPlanesAny = -1;

// Activation_ is Fp16 or Bf16 of ptx.cuh, kValues_ a StreamValues of params.h. A warp computes
// kRowTiles_ x 16 output rows for kTokenTiles_ x 8 tokens.
template <class Activation_, int kValues_, int kRank_, int kPlanes_, int kRowTiles_,
          int kTokenTiles_>
struct LinearTraits {
  using Activation = Activation_;
  static constexpr int kValues = kValues_, kRank = kRank_, kPlanes = kPlanes_;
  static constexpr int kRowTiles = kRowTiles_, kTokenTiles = kTokenTiles_;
  static_assert(kPlanes == 1 || kRank == (kPlanes == kPlanesAny ? kRankAny : kRankOne));

  // ---- what a warp computes ----

  static constexpr int kWarpRows = kRowTiles * kBlockRows;
  static constexpr int kWarpTokens = 8 * kTokenTiles;
  static constexpr bool kSparse = kValues != kDense;
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr bool kThirdPlane = kPlanes == 3 || kPlanes == kPlanesAny;
  // With two or three planes and one rank, the sign operand is the level (an odd multiple of the
  // last plane's unit) and not the level times u: u multiplies the sums once, at the end. With
  // several ranks each level is multiplied by its u, and rounded.
  static constexpr bool kLevelOperand = kPlanes > 1;
  // The products of few tokens are a chain of dependent mma, 33 cycles each. There the signs add
  // into accumulators of their own, so that two chains run side by side.
  static constexpr bool kTwoChains = (kValues == kW16 && kTokenTiles <= 2) || kLevelOperand;

  // ---- how registers are spent ----

  // Token tiles that go through a K-block together. Scales need a second set of sums, which would
  // spill if it held 64 tokens at once.
  static constexpr int kPassTiles =
      kScaled && kTokenTiles == 8 ? (kValues == kI8 ? 2 : 4) : kTokenTiles;
  // Activation fragments that are held at once: 16 registers at most.
  static constexpr int kHeldFragments = kPassTiles < 4 ? kPassTiles : 4;
  // Whether offsets that no K-block changes are kept in registers instead of being derived again.
  // Tiles of 64 tokens and the loop over ranks have no register to spare, and their products hide
  // the few additions.
  static constexpr bool kKeepsOffsets = kTokenTiles < 8 && kRank == kRankOne;

  static __device__ __forceinline__ uint32_t kept(uint32_t value) {
    return kKeepsOffsets ? keep(value) : value;
  }

  // ---- what a stage holds ----

  // Wide instances stage a whole tile of tokens, the others only the tokens that exist.
  static constexpr bool kWide = kTokenTiles >= 4;
  // Activation rows whose address a lane holds: one where all rows of a tile are staged, because
  // then the others follow at a fixed distance.
  static constexpr int kTokenAddresses = kWide ? 1 : kTokenTiles;
  static constexpr int kValueBytes = stream_value_bytes(kValues);
  static constexpr int kSignsAt = kValueBytes + stream_metadata_bytes(kValues);
  // All lanes copy the head of a block, 16 bytes each, and some of them the tail (copy.cuh).
  static constexpr int kHeadBytes = kPlanes == 1 ? kValueBytes : kSignsAt + 2 * kSignBytes;
  static_assert(kHeadBytes % 512 == 0);
  // Words of sign bits that a lane reads of a block.
  static constexpr int kSignWords = kThirdPlane ? 3 : kPlanes;
};

}  // namespace slab
