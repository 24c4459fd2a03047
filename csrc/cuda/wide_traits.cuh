// What an instance of the wide decode loop is: the numbers that follow from its template arguments
// alone.
#pragma once

#include "traits.cuh"

namespace slab {

// Whether a wide kernel knows its scale groups: whole K-blocks (128 inputs, or rows), halves or
// quarters of them, or any, which is asked at run time.
enum ScaleGroups : int { kGroupsWhole, kGroupsShort, kGroupsAny };

// Activation_ is Fp16 or Bf16 of ptx.cuh, kValues_ a StreamValues of params.h; kRank_ is kRankNone,
// kRankOne or kRankAny, kPlanes_ 1, 2 or 3.
template <class Activation_, int kValues_, int kRank_, int kPlanes_, int kGroups_>
struct WideTraits {
  using Activation = Activation_;
  static constexpr int kValues = kValues_, kRank = kRank_, kPlanes = kPlanes_, kGroups = kGroups_;
  static constexpr bool kSparse = kValues != kDense;
  static constexpr bool kScaled = kValues == kI8 || kValues == kI4;
  static constexpr bool kSigned = kSparse && kRank != kRankNone;

  // A warp has 32 rows and 16 tokens, or 8 of any rank.
  static constexpr int kTokenTiles = kRank == kRankAny ? 1 : 2;
  static constexpr int kTokens = 8 * kTokenTiles;
  // Tiles of 8 columns of the sign product: the tokens of rank one, or every (rank, token).
  static constexpr int kSignTiles = !kSigned ? 0 : kRank == kRankAny ? 4 : kTokenTiles;

  // Bytes of a block in front of its scales, and of them what all lanes copy, 16 bytes each.
  static constexpr int kMetadataAt = kBlockTiles * stream_value_bytes(kValues);
  static constexpr int kSignsAt = kMetadataAt + stream_metadata_bytes(kValues);
  static constexpr int kScalesAt = kSignsAt + (kSigned ? kPlanes * kSignBytes : 0);
  static constexpr int kHeadBytes = kScalesAt / 512 * 512;
  static constexpr bool kHasTail = kScaled || kScalesAt > kHeadBytes;
};

}  // namespace slab
