// Planning: what no K-block changes is computed here, once, and most of it kept in registers.
#pragma once

#include "warp.cuh"

namespace slab {

template <class Traits>
__device__ __forceinline__ Warp<Traits>::Warp(const LinearParams& params, uint32_t shared,
                                              int table_bytes)
    : params(params),
      place(place_of<Traits::kPairs>(params)),
      role(role_of(params)),
      tables(shared) {
  rank = Traits::kRank != kRankAny ? Traits::kRank : Traits::kSparse ? params.rank : 0;
  planes = Traits::kPlanes != kPlanesAny ? Traits::kPlanes : params.planes;
  const int staged = params.tile_tokens;
  tokens = min(staged, params.tokens - place.token_tile * staged);
  const StageLayout layout = plan_stage(staged);
  ring.begin = shared + table_bytes + role.group * params.stages * ring.stage_bytes;
  ring.end = Traits::kept(ring.begin + params.stages * ring.stage_bytes);
  read_stage = write_stage = Traits::kept(ring.begin);
  const int first = first_k_block();
  plan_weights(layout, first);
  plan_activations(layout, first, staged);
  plan_reads(layout);
  sums.clear();
}

// `staged` token rows have a place in a stage.
template <class Traits>
__device__ __forceinline__ StageLayout Warp<Traits>::plan_stage(int staged) {
  read.scales_at = Traits::kSignsAt + (rank ? planes * kSignBytes : 0);
  StageLayout layout;
  const int group_steps = Traits::kScaled ? params.group_steps : kSteps;
  layout.block_bytes = read.scales_at + stream_scale_bytes(Traits::kValues, group_steps);
  layout.v_rows_at = staged * kTokenRow;
  layout.weights_at = layout.v_rows_at + rank * kTokenRow;
  const int weight_bytes = params.warp_rows * Traits::kPairs * layout.block_bytes;
  ring.stage_bytes = (layout.weights_at + weight_bytes + 255) / 256 * 256;
  return layout;
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::plan_weights(const StageLayout& layout,
                                                           int first_k_block) {
  const int lane = role.lane;
  copy.tail_pieces = (layout.block_bytes - Traits::kHeadBytes) / 16;
  copy.l2_policy = weight_policy(params.token_tiles == 1);
#pragma unroll
  for (int p = 0; p < Traits::kPairs; ++p) {
    const int own = role.member + p * role.members;
    copy.has_block[p] = own < params.warp_rows * Traits::kPairs;
    // Past the end of the part the last pair is read again; its sums are not stored.
    const int pair = min(place.first_pair + own, place.end_pair - 1);
    const int64_t block = int64_t(pair) * params.num_k_blocks + first_k_block;
    copy.weights_from[p] =
        keep(params.stream + block * layout.block_bytes + 16 * lane + Traits::kCopyFrom);
    copy.weights_to[p] =
        Traits::kept(layout.weights_at + own * layout.block_bytes + 16 * lane + Traits::kCopyFrom);
    const int multiplied = role.row_warp * Traits::kPairs + p;
    read.blocks_at[p] =
        Traits::kept(layout.weights_at + multiplied * layout.block_bytes + 16 * lane);
  }
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::plan_activations(const StageLayout& layout,
                                                               int first_k_block, int staged) {
  const int lane = role.lane, first_token = place.token_tile * staged;
  copy.token_row = lane / 16 + 2 * role.member;
  copy.token_step = 2 * role.members;
  int first_row = copy.token_row;
  if constexpr (Traits::kRebuilds) {  // A member's rows follow each other.
    // This is staged / members, because warp_rows is a power of two.
    const int share = Traits::kWarpTokens >> (31 - __clz(params.warp_rows));
    first_row = role.member * share + lane / 16;
    copy.own_rows = min(share, tokens - role.member * share);
    copy.tokens_to =
        Traits::kept(first_row * kTokenRow + (lane % 16 * 16 ^ Traits::swizzle(first_row)));
  }
  copy.tokens_from = keep(params.x + 2 * ((first_token + first_row) * params.token_stride +
                                          int64_t(first_k_block) * kBlockInputs + lane % 16 * 8));
  copy.inputs = params.in_features - first_k_block * kBlockInputs;
  copy.token_piece = Traits::kept(lane % 16);
  copy.v_from =
      keep(params.v + (place.part * rank * params.num_k_blocks + first_k_block) * kTokenRow +
           lane % 16 * 16);
  copy.v_to = Traits::kept(layout.v_rows_at + 16 * (lane % 16));
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::plan_reads(const StageLayout& layout) {
  const int lane = role.lane;
  if constexpr (Traits::kRebuilds) return plan_rebuilding(layout);
  read.v_at = Traits::kept(layout.v_rows_at + lane / 8 * 16);
  // Lane l reads 8 bytes of signs at 8 l, of the only plane or of the third one. blocks_at already
  // holds 16 l, so subtract 8 l. (Of the first two of several planes it reads 16 bytes at 16 l.)
  const uint32_t signs_at =
      Traits::kSignsAt + (Traits::kThirdPlane ? 2 * kSignBytes : 0) - 8 * lane;
  // Lane l = 4 g + t reads 8 bytes of scales at 8 g, those of rows g and g + 8 of both tiles.
  const uint32_t scales_at = read.scales_at + (lane / 4 * 8 - 16 * lane);
  read.signs_at = Traits::kept(signs_at);
  read.scales_at = Traits::kept(scales_at);
  const int row = role.token_warp * Traits::kWarpTokens + lane % 8;
  read.tokens_at = Traits::kept(row * kTokenRow + (lane / 8 * 16 ^ Traits::swizzle(row)));
  // A LOP3 takes one immediate operand. With the magic number in a register, which the opaque zero
  // forces, mask and magic number are applied by one instruction.
  const uint32_t zero = Traits::kKeepsOffsets ? opaque_zero(params.tokens) : 0u;
  read.value_magic = (Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) | zero;
  read.level_magic = T::kNibbleMagic | zero;
}

}  // namespace slab
