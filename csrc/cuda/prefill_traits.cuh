// What an instance of a kernel for many tokens is: the numbers that follow from its template
// arguments alone.
#pragma once

#include "prefill.h"
#include "ptx.cuh"

namespace slab {

// How W x is computed.
//
//   kPrefillOne      the kept values by one sparse product; no sign term
//   kPrefillBoth     the signs by a second sparse product, with v * x; rank one, one plane
//   kPrefillRebuild  W is rebuilt in registers and multiplied by dense products; rank one with one
//                    plane, or any
enum PrefillKind : int { kPrefillOne, kPrefillBoth, kPrefillRebuild };

// Scale groups of 32, 64 or 128 inputs, known at run time only.
constexpr int kGroupStepsAny = 0;

// Where a warp turns 16 tokens x 16 rows before they are stored: 48 bytes a token, so that eight
// tokens meet all banks.
constexpr int kStagingPitch = 48, kStagingBytes = 16 * kStagingPitch;

// A CTA has kGroups_ warpgroups that multiply, 64 rows each, and one that fetches; kPair_ CTAs are
// a cluster, kResident_ of them share a multiprocessor. kGroupSteps_: steps that a scale covers,
// kSteps or kGroupStepsAny; without scales kSteps.
template <class Activation_, int kKind_, int kValues_, bool kAny_, int kTokens_, int kGroups_,
          int kPair_, int kResident_, int kGroupSteps_>
struct PrefillTraits {
  using Activation = Activation_;
  static constexpr int kKind = kKind_, kValues = kValues_, kTokens = kTokens_, kGroups = kGroups_;
  static constexpr int kPair = kPair_, kResident = kResident_, kGroupSteps = kGroupSteps_;
  static constexpr bool kAny = kAny_;  // any rank and planes
  static constexpr bool kScaled = kValues != kW16, kSigns = kKind != kPrefillOne;

  // ---- a CTA ----

  static constexpr int kConsumerWarps = 4 * kGroups, kConsumers = 128 * kGroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kRows = 64 * kGroups, kPairs = kRows / kBlockRows;
  // Registers of a thread that multiplies and of one that fetches. All together are at most what
  // the CTA was started with: 65536 / kResident / kThreads each, rounded down to a multiple of 8.
  static constexpr int kConsumerRegisters = kResident == 2 ? 96 : kGroups == 4 ? 112 : 232;
  static constexpr int kProducerRegisters = kGroups == 4 ? 24 : 40;
  // Whether what no K-block changes is held in registers, instead of being derived again.
  static constexpr bool kHolds = kConsumerRegisters > 200 || (kResident == 2 && !kAny);
  static __device__ __forceinline__ uint32_t held(uint32_t value) {
    return kHolds ? pin(value) : value;
  }

  // ---- a block of the stream ----

  static constexpr int kTileBytes = stream_value_bytes(kValues);  // values of a row tile
  static constexpr int kMetadataAt = kBlockTiles * kTileBytes;
  static constexpr int kSignsAt = kMetadataAt + stream_metadata_bytes(kValues);

  // ---- shared memory, from an address that 1024 divides ----

  static constexpr int kTableAt = 0;  // 16 x 8 bytes
  // Barriers of the stages, 8 bytes each: weights and tokens are there or may be overwritten, and
  // v * x is there. (The ring's first ones are at multiples of kBarriersAligned.)
  static constexpr int kFullWeightsAt = 128, kFullTokensAt = 256;
  static constexpr int kEmpty = 64, kProducts = 128;  // from the barrier of a full stage on
  static constexpr int kStagingAt = 512;
  static constexpr int kHeadBytes =
      (kStagingAt + kConsumerWarps * kStagingBytes + 1023) / 1024 * 1024;
  static constexpr int kBoxBytes = 2 * kStageInputs * kTokens;
  static constexpr int kTokenBytes = (kKind == kPrefillBoth ? 2 : 1) * kBoxBytes;  // of a stage

  static __device__ __forceinline__ int block_bytes(const PrefillParams& params) {
    int planes = kSigns ? 1 : 0;
    if constexpr (kAny) planes = params.planes;
    return kSignsAt + planes * kSignBytes + stream_scale_bytes(kValues, params.group_steps);
  }
  static __device__ __forceinline__ int weight_bytes(const PrefillParams& params) {
    int rank = kSigns ? 1 : 0;
    if constexpr (kAny) rank = params.rank;
    return (kPairs * block_bytes(params) + rank * kTokenRow + 127) / 128 * 128;
  }
};

// A ring's next stage: where it is, the barrier that says that it is full, and the parity of the
// phase of that barrier which is waited for. The barriers of a ring begin at a multiple of
// kBarriersAligned.
constexpr uint32_t kBarriersAligned = 128;

struct PrefillRing {
  uint32_t at, full, parity;

  // To the next stage, by what is returned.
  __device__ __forceinline__ uint32_t advance(uint32_t distance, int stages) {
    full += 8;
    if (full % kBarriersAligned == uint32_t(8 * stages))
      full &= ~(kBarriersAligned - 1), parity ^= 1, distance *= 1 - stages;
    at += distance;
    return distance;
  }
};

// Addresses of a CTA's shared memory.
template <class Traits>
struct PrefillShared {
  uint32_t base, tokens, weights;  // the rings' first bytes
  int block_bytes, weight_bytes;

  __device__ __forceinline__ PrefillShared(const PrefillParams& params, const void* shared)
      : base((shared_address(shared) + 1023u) & ~1023u),
        tokens(base + Traits::kHeadBytes),
        weights(tokens + params.token_stages * Traits::kTokenBytes),
        block_bytes(Traits::block_bytes(params)),
        weight_bytes(Traits::weight_bytes(params)) {}

  __device__ __forceinline__ PrefillRing weight_ring(uint32_t parity) const {
    return {weights, base + Traits::kFullWeightsAt, parity};
  }
  __device__ __forceinline__ PrefillRing token_ring(uint32_t parity) const {
    return {tokens, base + Traits::kFullTokensAt, parity};
  }
};

}  // namespace slab
