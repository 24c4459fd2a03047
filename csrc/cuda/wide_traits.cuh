// What an instance of the kernels for up to 16 tokens with x in the ring is.
#pragma once

#include "decode_operands.cuh"

namespace slab {

// The other parameters are those of DecodeTraits. kAnyRank_: any rank, for up to 8 tokens; else
// rank one, or none, for up to 16. Every instance takes at most 128 registers a thread, so that a
// CTA may have 16 warps, or two CTAs 8 warps each.
template <class Activation_, int kValues_, int kPlanes_, int kGroupSteps_, bool kAnyRank_ = false>
struct WideTraits : DecodeTraits<Activation_, kValues_, kPlanes_, kGroupSteps_> {
  static constexpr bool kAnyRank = kAnyRank_;
  static_assert(kPlanes_ > 0 || !kAnyRank);

  static constexpr int kTokenTiles = kAnyRank ? 1 : 2;  // of 8 tokens
  // Tiles of 8 columns that the sign term has at most: with any rank, every (rank, token).
  static constexpr int kSignTiles = kAnyRank ? 4 : kTokenTiles;
};

}  // namespace slab
