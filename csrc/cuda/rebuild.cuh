// The linear for 17 tokens and more that rebuilds W in registers (rebuilt.cuh) and multiplies it
// once, by mma.sync of 16 x 8 x 16, where linear.cuh multiplies S and each rank's signs by mma.sp
// with x and x v: as much tensor work as at rank one, and ranks and planes cost nothing per token.
// Everything around the main loop is that of linear.cuh.
//
//   for step in the 4 steps of 32 inputs of a K-block:
//     kept = values(rows, step) * scale                       // 16-bit pairs
//     for k16 in 2:
//       pruned = the signs' levels * sum of u_r v_r           // of the pruned positions alone
//       a = kept and pruned in their places                   // by the metadata's selectors
//       for n in token tiles: sums += mma.sync(a, x[n, k16])
//
// Of a k16, lane t multiplies inputs 4 t to 4 t + 3. They are one group of W, and 8 bytes of x,
// read by one LDS.64.
//
// In front of the rings stand the tables: the selectors, 128 bytes; the powers of the CTA's rows, a
// float each; u of these rows and all ranks, a word each. Both are [row pair][rank] x 128 bytes: for
// each g those of rows g and g + 8 of both tiles, which one LDS.128 loads.
#pragma once

#include "linear.cuh"

namespace slab {

constexpr int kPairWords = 4 * kBlockRows;  // bytes of a word for each row of a row pair

// Bytes in front of the rings: backends/cuda/tiles.py knows them, too.
__device__ __forceinline__ int table_bytes(const LinearParams& params) {
  return kSelectorBytes + params.warp_rows * (1 + params.rank) * kPairWords;
}

// The tables are filled before this kernel waits for the one before it.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::fill_tables() const {
  const int thread = (role.group * role.members + role.member) * 32 + role.lane;
  if (thread < 16) fill_selectors(tables, thread);
  const int threads = 32 * role.members * params.warp_inputs;
  for (int row = thread; row < params.warp_rows * kBlockRows; row += threads) {
    const int own = row / kBlockRows, within = row % kBlockRows;
    const int stored = min(place.first_pair + own, place.end_pair - 1) * kBlockRows + within;
    const uint32_t word = 16 * (within % 8) + 4 * (within / 8);
    float power = 1.0f;
    if constexpr (Traits::kPowers) {
      if (params.powers) power = __ldg(params.powers + stored);
      store_shared32(tables + kSelectorBytes + own * kPairWords + word, __float_as_uint(power));
    }
    uint32_t to =
        tables + kSelectorBytes + (params.warp_rows + own * rank) * uint32_t(kPairWords) + word;
    const uint32_t* const u = params.u + int64_t(stored) * rank;
#pragma unroll 1
    for (int r = 0; r < rank; ++r, to += kPairWords)
      store_shared32(to, Traits::kPowers ? powered<T>(__ldg(u + r), power) : __ldg(u + r));
  }
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::plan_rebuilding(const StageLayout& layout) {
  const int lane = role.lane, g = lane / 4, t = lane % 4;
  const int row = role.token_warp * Traits::kWarpTokens + g;
  read.tokens_at = Traits::kept(row * kTokenRow + (t / 2 * 16 ^ Traits::swizzle(row)) + t % 2 * 8);
  read.v_at = Traits::kept(layout.v_rows_at + 8 * t);
  // Counted from blocks_at, which already holds 16 l.
  read.metadata_at = Traits::kept(Traits::kMetadataAt - 16 * t);
  const int third = Traits::kAny && planes == 3 ? 2 * kSignBytes : 0;
  read.signs_at = Traits::kept(Traits::kSignsAt + third - 8 * lane);
  read.scales_at = Traits::kept(read.scales_at + 8 * g - 16 * lane);
  read.powers_at = Traits::kept(tables + kSelectorBytes + role.row_warp * kPairWords + 16 * g);
  read.selector_shift = Traits::kept(selector_shift(t));
  // In a register, as in plan_reads.
  read.value_magic =
      (Traits::kValues == kI8 ? T::kByteMagic : T::kNibbleMagic) | opaque_zero(params.tokens);
}

// The address of this lane's u of the first rank.
template <class Traits>
__device__ __forceinline__ uint32_t Warp<Traits>::u_at() const {
  return read.powers_at + (params.warp_rows + role.row_warp * (rank - 1)) * uint32_t(kPairWords);
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::rebuild_stage() {
  Rebuilt block;
  open(block);
  rebuild_step<0>(block);
  rebuild_step<1>(block);
  rebuild_step<2>(block);
  rebuild_step<3>(block);
  read_stage = ring.after(read_stage);
}

// Loads what all steps of the K-block use.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::open(Rebuilt& block) const {
  block.at = read_stage + read.blocks_at[0];
  block.v = read_stage + read.v_at;
  block.tokens = read_stage + read.tokens_at;
#pragma unroll
  for (int holder = 0; holder < 4; ++holder)
    load_shared(block.metadata[holder], block.at + read.metadata_at + 16 * holder);
  load_signs(block);
  if constexpr (!Traits::kAny) load_shared(block.u, u_at());
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::load_signs(Rebuilt& block) const {
  uint32_t own[2] = {0, 0}, two[4] = {0, 0, 0, 0};
  if (!Traits::kAny || planes != 2) load_shared(own, block.at + read.signs_at);
  if (Traits::kAny && planes != 1) load_shared(two, block.at + Traits::kSignsAt);
#pragma unroll
  for (int tile = 0; tile < kBlockTiles; ++tile)
    block.signs[tile] = {{two[2 * tile], two[2 * tile + 1]}, own[tile]};
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::rebuild_step(Rebuilt& block) {
  Weights kept;
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m)
    load_kept<T, Traits::kValues, kStep>(
        kept[m], block.words[m], block.at + m * uint32_t(Traits::kValueBytes), read.value_magic);
  if constexpr (Traits::kScaled) {
    // Where a scale group begins. The first step always is one's.
    if (kStep == 0 || (kStep & (params.group_steps - 1)) == 0) load_scales<kStep>(block);
#pragma unroll
    for (int m = 0; m < kBlockTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        kept[m][i] = T::multiply(kept[m][i], twice(block.scales[m], i % 2));
  }
  Selectors two;
  Weights pruned;
  if constexpr (Traits::kAny) {
    load_selectors<kStep, 0>(two, block);
    load_selectors<kStep, 1>(two, block);
    add_ranks(pruned, block.v + 64 * kStep, two);
    apply_levels<kStep>(pruned, block);
    add_rebuilt<kStep, 0>(block, kept, pruned, two);
    add_rebuilt<kStep, 1>(block, kept, pruned, two);
  } else {
    load_selectors<kStep, 0>(two, block);
    load_pruned<kStep, 0>(pruned, block, two);
    add_rebuilt<kStep, 0>(block, kept, pruned, two);
    load_selectors<kStep, 1>(two, block);
    load_pruned<kStep, 1>(pruned, block, two);
    add_rebuilt<kStep, 1>(block, kept, pruned, two);
  }
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::load_scales(Rebuilt& block) const {
  // This is kStep / group_steps, because group_steps is 1, 2 or 4.
  const int group = kStep >> (params.group_steps >> 1);
  uint32_t both[2];
  load_shared(both, block.at + read.scales_at + group * kScaleBytes);
  uint32_t words[4] = {};
  if constexpr (Traits::kPowers) load_shared(words, read.powers_at);
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m)
    block.scales[m] =
        scale_pair<T>(both[m], __uint_as_float(words[2 * m]), __uint_as_float(words[2 * m + 1]));
}

// The selectors of a k16's four groups.
template <class Traits>
template <int kStep, int kColumn>
__device__ __forceinline__ void Warp<Traits>::load_selectors(Selectors& two,
                                                             const Rebuilt& block) const {
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m) {
    const uint32_t word = block.metadata[2 * (kStep % 2) + kColumn][2 * m + kStep / 2];
    load_shared(two[m][2 * kColumn], selectors_at<0>(tables, word, read.selector_shift));
    load_shared(two[m][2 * kColumn + 1], selectors_at<1>(tables, word, read.selector_shift));
  }
}

// The pruned entries of a k16, of one rank and plane.
template <class Traits>
template <int kStep, int kColumn>
__device__ __forceinline__ void Warp<Traits>::load_pruned(Weights& pruned, const Rebuilt& block,
                                                          const Selectors& two) const {
  uint32_t v[2];
  load_shared(v, block.v + 64 * kStep + 32 * kColumn);
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m) {
    constexpr int kNear = 2 * kColumn, kFar = kNear + 1;
    const uint32_t near = choose_bytes(v[0], v[1], two[m][kNear][0] >> 16);
    const uint32_t far = choose_bytes(v[0], v[1], two[m][kFar][0] >> 16);
    const uint32_t signs = block.signs[m].own;
    pruned[m][kNear] = flip<kStep, kNear>(T::multiply(near, block.u[2 * m]), signs);
    pruned[m][kFar] = flip<kStep, kFar>(T::multiply(far, block.u[2 * m + 1]), signs);
  }
}

// The magnitudes of a step's pruned entries, of any rank. v: this lane's, of the first.
template <class Traits>
__device__ __forceinline__ void Warp<Traits>::add_ranks(Weights& pruned, uint32_t v,
                                                        const Selectors& two) const {
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) pruned[m][i] = 0;
  uint32_t u = u_at();
#pragma unroll 1
  for (int r = 0; r < rank; ++r, u += kPairWords, v += kTokenRow) {
    uint32_t u_r[4], v_r[2][2];
    load_shared(u_r, u);
    load_shared(v_r[0], v);
    load_shared(v_r[1], v + 32);
#pragma unroll
    for (int m = 0; m < kBlockTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pruned[m][i] =
            add_rank<T>(pruned[m][i], v_r[i / 2], two[m][i][0] >> 16, u_r[2 * m + i % 2]);
  }
}

template <class Traits>
template <int kStep>
__device__ __forceinline__ void Warp<Traits>::apply_levels(Weights& pruned,
                                                           const Rebuilt& block) const {
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m) {
    Fragment levels;
    level_pairs<T, kStep>(levels, block.signs[m], planes);
#pragma unroll
    for (int i = 0; i < 4; ++i) pruned[m][i] = T::multiply(pruned[m][i], levels[i]);
  }
}

// Adds a k16's products with all token tiles.
template <class Traits>
template <int kStep, int kColumn>
__device__ __forceinline__ void Warp<Traits>::add_rebuilt(const Rebuilt& block, const Weights& kept,
                                                          const Weights& pruned,
                                                          const Selectors& two) {
  Weights a;
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      constexpr int kFirst = 2 * kColumn;
      const uint32_t from = kept[m][kFirst + h], other = pruned[m][kFirst + h];
      a[m][h] = choose_bytes(from, other, two[m][kFirst + h][0]);
      a[m][2 + h] = choose_bytes(from, other, two[m][kFirst + h][1]);
    }
  // A row's k16 is two pieces. Its number's low bits are XORed, because of the swizzle.
  constexpr int kNumber = 2 * kStep + kColumn;
  const uint32_t tokens = (block.tokens ^ (kNumber % 4 << 5)) + (kNumber / 4 << 7);
#pragma unroll
  for (int n = 0; n < Traits::kTokenTiles; ++n) {
    uint32_t b[2];
    load_shared(b, tokens + n * 8 * kTokenRow);
#pragma unroll
    for (int m = 0; m < kBlockTiles; ++m) T::mma_dense(sums.sum[m][n], a[m], b[0], b[1]);
  }
}

template <class Traits>
__device__ __forceinline__ void Warp<Traits>::divide_by_powers() {
  uint32_t words[4];
  load_shared(words, read.powers_at);
#pragma unroll
  for (int m = 0; m < kBlockTiles; ++m)
#pragma unroll
    for (int n = 0; n < Traits::kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums.sum[m][n][i] *= inverse_power(__uint_as_float(words[2 * m + i / 2]));
}

template <class Traits>
__device__ __forceinline__ void rebuild_linear(const LinearParams& params) {
  extern __shared__ __align__(256) uint8_t shared[];
  let_successor_start();
  if (token_tile_of(params) >= params.token_tiles) return;  // behind the last token
  const int tables = table_bytes(params);
  Warp<Traits> warp(params, shared_address(shared), tables);
  warp.multiply_k_blocks();
  if constexpr (Traits::kPowers)
    if (params.powers) warp.divide_by_powers();
  if (params.adapter_steps && warp.place.split == 0) warp.add_adapter();
  warp.write_result(reinterpret_cast<float*>(shared + tables));
}

}  // namespace slab
