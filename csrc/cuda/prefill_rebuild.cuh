// The operands of kPrefillRebuild: W = S + u v^T * signs itself, 16-bit numbers, made in registers.
//
// In a k16 a lane of an A fragment holds two halves of groups: inputs 2 t, 2 t + 1 and 2 t + 8,
// 2 t + 9 of rows g and g + 8. Two neighbours share two groups. The even lane makes that of the
// first eight inputs and the odd lane that of the second eight, each of both rows; each keeps the
// half that it needs itself and hands the other half over by one shuffle. So lane 4 g + t makes
// group (0, 2, 1, 3)[t] of the k16 and reads the stream as lane 4 g + (0, 2, 1, 3)[t] would.
//
// A group is put together by PRMT: from the kept pair and from the pair of pruned entries, by
// selectors that a table in shared memory gives for the group's nibble.
#pragma once

#include "hopper.cuh"
#include "prefill_factors.cuh"
#include "wgmma.cuh"

namespace slab {

// Entry i of the table, 8 bytes at 8 i. Word 0: in its low half the selector of the half that the
// lane keeps, in its high half that of the two v which the pruned entries take of a group's four.
// Word 1: the selector of the half that is handed over. Even lanes keep inputs 0 and 1 and look for
// the nibble, odd lanes keep 2 and 3 and look for nibble ^ kOddEntry: as no legal nibble is such a
// number, all lanes together read 128 bytes and meet no bank twice.
constexpr uint32_t kOddEntry = 11;
constexpr int kTableEntries = 16;

constexpr bool table_entries_differ() {
  for (int a = 0; a < kPatterns; ++a)
    for (int b = 0; b < kPatterns; ++b)
      if ((pattern_nibble(a) ^ kOddEntry) == pattern_nibble(b)) return false;
  return true;
}
static_assert(table_entries_differ(), "even and odd lanes share one table");

__device__ __forceinline__ void fill_table(uint32_t table, uint32_t i) {
  if (i >= kTableEntries) return;
  // Of even lanes if the first position is below the second, which no other nibble is legal for.
  const bool odd = (i & 3) >= (i >> 2);
  const uint32_t nibble = odd ? i ^ kOddEntry : i;
  const int first = first_position(nibble), second = second_position(nibble);
  uint32_t place[kGroup], order = 0;
  int seen = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const bool kept = j == first || j == second;
    place[j] = j == first ? 0x10u : j == second ? 0x32u : seen == 0 ? 0x54u : 0x76u;
    if (!kept) order |= (0x10u + 0x22u * j) << (8 * seen++);
  }
  const uint32_t low = place[0] | place[1] << 8, high = place[2] | place[3] << 8;
  store_shared(table + 8 * i, {(odd ? high : low) | order << 16, odd ? low : high});
}

template <class Traits>
struct RebuildOperands {
  using T = typename Traits::Activation;
  static constexpr bool kMadeEarly = false;
  // Products are issued k16 by k16 where registers are few: A then takes 8 of them and not 16.
  static constexpr int kIssues = Traits::kHolds || (Traits::kGroups == 2 && !Traits::kScaled) ? 1 : 2;  // of a step
  // One load of metadata serves two steps where registers allow it.
  static constexpr bool kHoldsMetadata = Traits::kConsumerRegisters > 200;

  uint32_t a[4 / kIssues][4];  // of one k16 each
  uint32_t kept[4];
  uint32_t held[2][2];  // metadata of steps 2 and 3
  uint32_t signs;
  uint32_t values_at, metadata_at, signs_at, scales_at, v_at;
  // 32 times the lane, and by how much a word of metadata is shifted: shifts take the lowest five
  // bits of a number.
  uint32_t lane_and_shift;
  uint32_t table;  // of the lane, twice
  int scale_shift;
  PrefillRows<Traits> rows;
  PrefillKept<Traits> values;

  // Addresses are those of the next stage.
  __device__ __forceinline__ RebuildOperands(const PrefillParams& params,
                                             const PrefillShared<Traits>& shared, int warp,
                                             int lane)
      : values(params.tokens) {
    const int t = lane % 4, group = t == 1 ? 2 : t == 2 ? 1 : t, mine = lane - t + group;
    const int tile = warp % kBlockTiles;
    const uint32_t pair_at = shared.weights + warp / kBlockTiles * shared.block_bytes;
    // The nibble comes to bits 3 to 6: 8 times its number.
    lane_and_shift = slab::pin(32 * lane + ((4 * group - 3) & 31));
    table = slab::pin((shared.base ^ (t % 2 ? 8 * kOddEntry : 0)) * 0x10001u);
    values_at = pair_at + tile * Traits::kTileBytes + 16 * mine;
    metadata_at = pair_at + Traits::kMetadataAt + lane / 4 * 64 + 8 * tile;
    signs_at = pair_at + Traits::kSignsAt + 8 * mine + 4 * tile;
    scales_at = pair_at + Traits::kSignsAt + kSignBytes + lane / 4 * 8 + 4 * tile;
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

  __device__ __forceinline__ void open() { signs = load_shared32(signs_at); }
  __device__ __forceinline__ void move(uint32_t distance) {
    values_at += distance, metadata_at += distance, signs_at += distance, v_at += distance;
    if constexpr (Traits::kScaled) scales_at += distance;
  }

  // The nibbles of both rows of a k16, as addresses of their entries of the table.
  template <int kStep, int kColumn>
  __device__ __forceinline__ uint32_t entries() {
    const uint32_t at = metadata_at + 32 * (kStep % 2) + 16 * kColumn;
    uint32_t word;
    if constexpr (!kHoldsMetadata) {
      word = load_shared32(at + 4 * (kStep / 2));
    } else if constexpr (kStep < 2) {
      uint32_t r[2];
      load_shared(r, at);
      word = r[0], held[kStep][kColumn] = r[1];
    } else {
      word = held[kStep % 2][kColumn];
    }
    return and_xor(__funnelshift_r(word, word, lane_and_shift), 0x00780078u, table);
  }

  // Where A of a k16 is.
  static constexpr SLAB_HD int slot(int step, int column) {
    return kIssues == 2 ? column : step % 2 * 2 + column;
  }

  // A of the k16 of an issue.
  template <int kGroupSteps, int kStep, int kIssue>
  __device__ __forceinline__ void make() {
    if constexpr (kIssue == 0) {
      rows.template load_scales<kGroupSteps, kStep>(scales_at, scale_shift);
      values.template load<kStep>(kept, values_at, rows);
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
    uint32_t(&to)[4] = a[slot(kStep, kColumn)];
    uint32_t factor[2], both = entries<kStep, kColumn>();
    load_shared(factor, v_at + 64 * kStep + 32 * kColumn);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 2 * kColumn + h;
      uint32_t select[2];
      load_shared(select, h ? both >> 16 : both & 0xFFFFu);
      const uint32_t magnitude = T::multiply(
          choose_bytes(factor[0], factor[1], select[0] >> 16), twice(rows.u, h));
      const uint32_t pruned = and_xor(signs << (4 * kStep + i), 0x80008000u, magnitude);
      const uint32_t own = choose_bytes(kept[i], pruned, select[0]);
      const uint32_t got = exchange(choose_bytes(kept[i], pruned, select[1]));
      to[h] = is_even_lane() ? own : got, to[h + 2] = is_even_lane() ? got : own;
    }
  }

  // Nothing of it is made after this or before.
  template <int kStep, int kIssue>
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kIssues == 1 || c == kIssue)
          asm volatile("" : "+r"(a[slot(kStep, c)][i])::"memory");
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
