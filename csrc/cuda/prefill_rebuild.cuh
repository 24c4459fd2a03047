// The operands of kPrefillRebuild: W = S + u v^T * signs itself, 16-bit numbers, made in registers.
//
// In a k16 a lane of an A fragment holds two halves of groups: inputs 2 t, 2 t + 1 and 2 t + 8,
// 2 t + 9 of rows g and g + 8. Two neighbours share two groups. The even lane makes that of the
// first eight inputs and the odd lane that of the second eight, each of both rows; each keeps the
// half that it needs itself and hands the other half over by one shuffle. So lane 4 g + t makes
// group (0, 2, 1, 3)[t] of the k16 and reads the stream as lane 4 g + (0, 2, 1, 3)[t] would.
//
// rebuilt.cuh puts a group together: odd lanes use the odd table of selectors.
#pragma once

#include "hopper.cuh"
#include "prefill_factors.cuh"
#include "wgmma.cuh"

namespace slab {

template <class Traits>
struct RebuildOperands {
  using T = typename Traits::Activation;
  static constexpr bool kMadeEarly = false;
  // Products are issued k16 by k16 where registers are few: A then takes 8 of them and not 16.
  static constexpr int kIssues = Traits::kGroups == 4 ? 2 : 1;  // of a step
  // One load of metadata serves two steps where registers allow it.
  static constexpr bool kHoldsMetadata = Traits::kConsumerRegisters > 200;

  uint32_t a[4 / kIssues][4];  // of one k16 each
  uint32_t held[2][2];         // metadata of steps 2 and 3
  TileSigns signs;
  uint32_t values_at, metadata_at, signs_at, scales_at, v_at;
  uint32_t several_at;  // words of two or three planes, from signs_at on
  // 32 times the lane, and by how much a word of metadata is shifted: shifts take the lowest five
  // bits of a number.
  uint32_t lane_and_shift;
  uint32_t table;  // of the lane
  const PrefillParams& params;
  int scale_shift;
  PrefillRows<Traits> rows;
  PrefillKept<Traits> values;

  // Addresses are those of the next stage.
  __device__ __forceinline__ RebuildOperands(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int warp,
                                             int lane)
      : params(params), values(params.tokens) {
    const int t = lane % 4, group = t == 1 ? 2 : t == 2 ? 1 : t, mine = lane - t + group;
    const int tile = warp % kBlockTiles;
    const uint32_t pair_at = shared.weights + warp / kBlockTiles * shared.block_bytes;
    lane_and_shift = slab::pin(32 * lane + selector_shift(group));
    table = slab::pin((shared.base + Traits::kTableAt) ^ (t % 2 ? 8 * kOddEntry : 0));
    values_at = pair_at + tile * Traits::kTileBytes + 16 * mine;
    metadata_at = pair_at + Traits::kMetadataAt + lane / 4 * 64 + 8 * tile;
    const int planes = Traits::kAny ? params.planes : 1;
    signs_at = pair_at + Traits::kSignsAt + 8 * mine + 4 * tile;
    several_at = 8 * mine + 4 * tile;
    scales_at = pair_at + Traits::kSignsAt + planes * kSignBytes + lane / 4 * 8 + 4 * tile;
    v_at = shared.weights + Traits::kPairs * shared.block_bytes + 8 * group;
    scale_shift = params.group_steps >> 1;
  }

  // Lane 0's shift is 29.
  __device__ __forceinline__ bool is_first_lane() const { return lane_and_shift == 29; }
  __device__ __forceinline__ bool is_even_lane() const { return (lane_and_shift & 32) == 0; }

  __device__ __forceinline__ void begin(const PrefillParams& params, const PrefillPlace& place,
                                        int warp, int lane) {
    rows.begin(params, place, warp, lane);
  }

  __device__ __forceinline__ void open() {
    if constexpr (Traits::kAny) {
      signs.own = 0;
      if (params.planes > 1) load_shared(signs.two, signs_at + several_at);
      if (params.planes != 2)
        signs.own = load_shared32(signs_at + (params.planes == 3 ? 2 * kSignBytes : 0));
    } else {
      signs.own = load_shared32(signs_at);
    }
  }
  __device__ __forceinline__ void move(uint32_t distance) {
    values_at += distance, metadata_at += distance, signs_at += distance, v_at += distance;
    if constexpr (Traits::kScaled) scales_at += distance;
  }

  // The word of metadata of a k16, with the nibbles of both rows.
  template <int kStep, int kColumn>
  __device__ __forceinline__ uint32_t nibbles() {
    const uint32_t at = metadata_at + 32 * (kStep % 2) + 16 * kColumn;
    if constexpr (!kHoldsMetadata) {
      return load_shared32(at + 4 * (kStep / 2));
    } else if constexpr (kStep < 2) {
      uint32_t r[2];
      load_shared(r, at);
      held[kStep][kColumn] = r[1];
      return r[0];
    } else {
      return held[kStep % 2][kColumn];
    }
  }

  // Where A of a k16 is.
  static constexpr SLAB_HD int slot(int step, int column) {
    return kIssues == 2 ? column : step % 2 * 2 + column;
  }

  // A of the k16 of an issue.
  template <int kStep, int kIssue>
  __device__ __forceinline__ void make() {
    if constexpr (kIssue == 0) {
      rows.template load_scales<kStep>(scales_at, scale_shift);
      values.template load<kStep>(values_at);
    }
    if constexpr (kIssues == 2) {
      make_k16<kStep, kIssue>();
    } else {
      make_k16<kStep, 0>();
      make_k16<kStep, 1>();
    }
  }

  template <int kStep, int kColumn>
  __device__ __forceinline__ void make_k16() {
    uint32_t (&to)[4] = a[slot(kStep, kColumn)];
    uint32_t kept[2], pruned[2], select[2][2];
    const uint32_t word = nibbles<kStep, kColumn>();
    load_shared(select[0], selectors_at<0>(table, word, lane_and_shift));
    load_shared(select[1], selectors_at<1>(table, word, lane_and_shift));
    values.template convert<kStep, kColumn>(kept, rows);
    if constexpr (Traits::kAny)
      any_pruned<kStep, kColumn>(pruned, select);
    else
      one_pruned<kStep, kColumn>(pruned, select);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t own = choose_bytes(kept[h], pruned[h], select[h][0]);
      const uint32_t got = exchange(choose_bytes(kept[h], pruned[h], select[h][1]));
      to[h] = is_even_lane() ? own : got, to[h + 2] = is_even_lane() ? got : own;
    }
  }

  // The pruned entries of both rows: of rank one and one plane.
  template <int kStep, int kColumn>
  __device__ __forceinline__ void one_pruned(uint32_t (&pruned)[2],
                                             const uint32_t (&select)[2][2]) const {
    uint32_t v[2];
    load_shared(v, v_at + 64 * kStep + 32 * kColumn);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      pruned[h] = T::multiply(choose_bytes(v[0], v[1], select[h][0] >> 16), twice(rows.u, h));
    pruned[0] = flip<kStep, 2 * kColumn>(pruned[0], signs.own);
    pruned[1] = flip<kStep, 2 * kColumn + 1>(pruned[1], signs.own);
  }

  // Of any rank and planes: the ranks are added in 16 bits, then the level multiplies the sum.
  template <int kStep, int kColumn>
  __device__ __forceinline__ void any_pruned(uint32_t (&pruned)[2],
                                             const uint32_t (&select)[2][2]) const {
    const uint32_t* u = params.u + int64_t(rows.row) * params.rank;
    const uint32_t* far_u = u + 8 * params.rank;
    uint32_t from = v_at + 64 * kStep + 32 * kColumn;
    pruned[0] = pruned[1] = 0;
#pragma unroll 1
    for (int r = params.rank; r > 0; --r, from += kTokenRow) {
      const uint32_t both = rows.powered_pair(__ldg(u++), __ldg(far_u++));
      uint32_t v[2];
      load_shared(v, from);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        pruned[h] = add_rank<T>(pruned[h], v, select[h][0] >> 16, twice(both, h));
    }
    if (params.planes == 1) {
      pruned[0] = flip<kStep, 2 * kColumn>(pruned[0], signs.own);
      pruned[1] = flip<kStep, 2 * kColumn + 1>(pruned[1], signs.own);
    } else {
      pruned[0] = T::multiply(pruned[0], level_pair<T, kStep, kColumn, 0, true>(
                                             signs.two, signs.own, T::kNibbleMagic, params.planes));
      pruned[1] = T::multiply(pruned[1], level_pair<T, kStep, kColumn, 1, true>(
                                             signs.two, signs.own, T::kNibbleMagic, params.planes));
    }
  }

  // Nothing of it is made after this or before.
  template <int kStep, int kIssue>
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kIssues == 1 || c == kIssue) asm volatile("" : "+r"(a[slot(kStep, c)][i])::"memory");
  }

  // b: the descriptor of the stage's tokens.
  template <int kStep, int kIssue>
  __device__ __forceinline__ void multiply(float (&sums)[Traits::kTokens / 2], uint32_t b) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (kIssues == 1 || c == kIssue)
        Products<Traits::kTokens>::dense(T(), sums, a[slot(kStep, c)], b + kStep % 2 * 4 + 2 * c);
  }
};

}  // namespace slab
