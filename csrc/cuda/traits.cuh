// What an instance of the fused linear is: the numbers that follow from its template arguments
// alone.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "rebuilt.cuh"

namespace slab {

// How many ranks the sign term has. kRankAny: a number, 0 included, that is known at run time only.
constexpr int kRankNone = 0, kRankOne = 1, kRankAny = -1;
// Two or three sign planes, known at run time only.
constexpr int kPlanesAny = -1;

// Activation_ is Fp16 or Bf16 of ptx.cuh, kValues_ a StreamValues of params.h. A warp computes
// kPairs_ row pairs, 32 output rows each, for kTokenTiles_ x 8 tokens.
template <class Activation_, int kValues_, int kRank_, int kPlanes_, int kPairs_, int kTokenTiles_>
struct LinearTraits {
  using Activation = Activation_;
  static constexpr int kValues = kValues_, kRank = kRank_, kPlanes = kPlanes_;
  static constexpr int kPairs = kPairs_, kTokenTiles = kTokenTiles_;
  static constexpr int kRowTiles = kPairs * kBlockTiles;
  static_assert(kPlanes == 1 || kRank == (kPlanes == kPlanesAny ? kRankAny : kRankOne));

  // ---- what a warp computes ----

  static constexpr int kWarpRows = kPairs * kBlockRows;
  static constexpr int kWarpTokens = 8 * kTokenTiles;
  static constexpr bool kSparse = kValues != kDense;
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr bool kThirdPlane = kPlanes == 3 || kPlanes == kPlanesAny;
  // With two or three planes and one rank, the sign operand is the level (an odd multiple of the
  // last plane's unit) and not the level times u: the signs add into accumulators of their own,
  // which u multiplies once, at the end. With several ranks each level is multiplied by its u, and
  // rounded.
  static constexpr bool kLevelOperand = kPlanes > 1;

  // ---- how registers are spent ----

  // Activation fragments that are held at once: 16 registers at most.
  static constexpr int kHeldFragments = kTokenTiles < 4 ? kTokenTiles : 4;
  // Whether offsets that no K-block changes are kept in registers instead of being derived again.
  // Tiles of 64 tokens and the loop over ranks have no register to spare, and their products hide
  // the few additions.
  static constexpr bool kKeepsOffsets = kTokenTiles < 8 && kRank == kRankOne;

  // Rows of activations are 16 pieces of 16 bytes. Piece c of token row r is stored at byte
  // 16 c ^ swizzle(r), so that the eight rows of an ldmatrix lie in different banks.
  static __device__ __forceinline__ uint32_t swizzle(int row) { return (row & 7) << 4; }

  static __device__ __forceinline__ uint32_t kept(uint32_t value) {
    return kKeepsOffsets ? keep(value) : value;
  }

  // ---- what a stage holds ----

  static constexpr int kValueBytes = stream_value_bytes(kValues);  // of a row tile
  static constexpr int kMetadataAt = kBlockTiles * kValueBytes;
  static constexpr int kSignsAt = kMetadataAt + stream_metadata_bytes(kValues);
  // All lanes copy the head of a block, 16 bytes each, and some of them the tail (copy.cuh), once
  // or twice.
  static constexpr int kHeadBytes = kSignsAt + (kPlanes == 1 ? 0 : 2 * kSignBytes);
  static_assert(kHeadBytes % 512 == 0);
  static constexpr bool kLongTail = false;
  // Addresses of copies are those of this byte of a block, because an instruction adds less than
  // 2048 to the source, or subtracts as much.
  static constexpr int kCopyFrom = 2048;
  // Words of sign bits that a lane reads for a row tile.
  static constexpr int kSignWords = kThirdPlane ? 3 : kPlanes;

  static constexpr bool kRebuilds = false;  // W in registers, for one dense product
};

// A linear that rebuilds W in registers. kAny_: of any rank, and of one, two or three planes.
template <class Activation_, int kValues_, bool kAny_, int kTokenTiles_>
struct RebuildTraits : LinearTraits<Activation_, kValues_, kAny_ ? kRankAny : kRankOne,
                                    kAny_ ? kPlanesAny : 1, 1, kTokenTiles_> {
  using Base = LinearTraits<Activation_, kValues_, kAny_ ? kRankAny : kRankOne,
                            kAny_ ? kPlanesAny : 1, 1, kTokenTiles_>;
  static constexpr bool kRebuilds = true, kAny = kAny_;
  static constexpr bool kPowers = Base::kScaled && RowPowers<Activation_>::kNeeded;

  static constexpr bool kKeepsOffsets = true;
  static __device__ __forceinline__ uint32_t kept(uint32_t value) { return keep(value); }

  // A lane reads 8 bytes of four token rows, each half a warp 32 bytes of them: rows r and r + 1 lie
  // in different banks.
  static __device__ __forceinline__ uint32_t swizzle(int row) { return (row & 3) << 5; }

  // The number of planes is not known, so that all of them are the tail: 1024 bytes at most.
  static constexpr int kHeadBytes = Base::kSignsAt;
  static constexpr bool kLongTail = kAny;
};

}  // namespace slab
