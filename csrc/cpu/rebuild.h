// Rebuilds blocks of the weight in fp32. An entry is either a kept value or u v times its sign or
// level.
#pragma once

#include "stream.h"

namespace slab {
namespace {

constexpr int kTileRows = 2 * kRows;

// Where the entries of a group stand, as answers to the questions that `Rebuild` asks, in the order
// in which it asks them: the answer to question q is bit 31 - q of a lane's word. Where V::kMoved
// is set, the word moves up by a bit after each question, by an addition, and V looks at bit 31
// only; AVX2's CPUs have more units for additions than for shifts.
template <class V>
struct Places {
  using F = typename V::F;
  using I = typename V::I;
  I words;
  int asked = 0;

  // With signs the first two questions are where the first pruned position is.
  SLAB_INLINE Places(I codes, bool signs) : words(V::places(codes)) {
    if (signs) return;
    if constexpr (V::kMoved) words = words << 2;
    asked = 2;
  }
  SLAB_INLINE void move() {
    if constexpr (V::kMoved) words = words + words;
    ++asked;
  }
  // The answer as bit 31; below it stands anything.
  SLAB_INLINE I answer() {
    const I top = V::kMoved ? words : words << asked;
    move();
    return top;
  }
  SLAB_INLINE F choose(F yes, F no) {
    const F chosen = V::choose(words, V::kMoved ? 31 : 31 - asked, yes, no);
    move();
    return chosen;
  }
};

template <class V>
struct Rebuild {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kStrips = kRows / kLanes;  // vectors that make one row block

  // u v^T of one group in one strip, added up over the ranks. u0 is u of the first rank; the others
  // are read at u. v is that of the group's inputs, a rank `padded` apart.
  template <int kRank>
  static SLAB_INLINE void low_rank(F (&out)[kGroup], F u0, const float* u, const float* v,
                                   int64_t rank, int64_t padded) {
    for (int i = 0; i < kGroup; ++i) out[i] = kRank ? u0 * V::broadcast(v + i) : V::zero();
    if constexpr (kRank > 1)
      for (int64_t r = 1; r < rank; ++r)
        for (int i = 0; i < kGroup; ++i)
          out[i] = V::fma(V::load(u + r * kRows), V::broadcast(v + r * padded + i), out[i]);
  }

  // Multiplies what a pruned entry would hold by its sign or its level, at every position where one
  // may be: the first pruned position is 0, 1 or 2, the second 1, 2 or 3.
  template <int kPlanes>
  static SLAB_INLINE void apply_signs(F (&out)[kGroup],
                                      const typename Stream<V>::template Words<kPlanes>& words,
                                      Places<V>& places) {
    if constexpr (kPlanes == 1) {
      // Bit 31 of `signs` is the second pruned position's sign, and r flips it for the first one.
      const I r = words.codes << 28;
      out[0] = V::signed_by(out[0], words.signs ^ r);
      out[1] = V::signed_by(out[1], words.signs ^ (r & places.answer()));
      out[2] = V::signed_by(out[2], words.signs ^ (r & places.answer()));
      out[3] = V::signed_by(out[3], words.signs);
    }
    if constexpr (kPlanes > 1) {
      const auto size = V::template sizes<kPlanes>(words.levels);
      const F one = V::signed_by(size.first, words.codes << 28);
      const F two = V::signed_by(size.second, words.signs);
      out[0] = out[0] * one;
      out[1] = out[1] * places.choose(one, two);
      out[2] = out[2] * places.choose(one, two);
      out[3] = out[3] * two;
    }
  }

  // Puts the kept values into their places and stores the group's four inputs.
  static SLAB_INLINE void store_group(F (&out)[kGroup], F first, F second, Places<V>& places,
                                      float* to) {
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      if (i < 3) out[i] = places.choose(first, out[i]);
      if (i > 0) out[i] = places.choose(second, out[i]);
      V::store(to + i * kTileRows, out[i]);
    }
  }

  // Rebuilds 16 rows x 128 inputs as tile[k][kTileRows], from lane 0 of the tile on. kRank is 0, 1,
  // or 2 for any rank from 2 on; kPlanes is 0 if kRank is.
  template <ValueType kValues, int kRank, int kPlanes>
  static void rebuild_ranked(const CpuWeight& w, int64_t rb, int64_t kb, float* tile) {
    const int64_t padded = w.k_blocks * kInputs;
    const uint8_t* const at = w.stream + (rb * w.k_blocks + kb) * w.block_size;
    for (int h = 0; h < kStrips; ++h) {
      const typename Stream<V>::Block b = Stream<V>::block_at(at, h, kValues, kPlanes);
      const float* const u = kRank ? w.u + rb * w.rank * kRows + h * kLanes : nullptr;
      const F u0 = kRank ? V::load(u) : V::zero();
      F scale = V::zero();
      typename Stream<V>::template Words<kPlanes> words;
      words.start(b);
      for (int word = 0; word < kGroups / 8; ++word) {
        words.load_eight(b, word);
        if (is_integer(kValues) && 32 * word % w.group_size == 0)
          scale = V::template load_values<kBf16>(b.scales + 2 * kRows * (32 * word / w.group_size));
        const uint8_t* const values = b.values + 64 * (kValues == kInt4 ? 2 * word : 0);
#pragma GCC unroll 4
        for (int j = 0; j < 8; ++j) {
          const int g = 8 * word + j;
          F first, second;
          Stream<V>::template load_values<kValues>(values, kValues == kInt4 ? j : g, first, second);
          if constexpr (is_integer(kValues)) {
            first = first * scale;
            second = second * scale;
          }
          F out[kGroup];
          const float* const v = kRank ? w.v + kb * kInputs + kGroup * g : nullptr;
          low_rank<kRank>(out, u0, u, v, w.rank, padded);
          Places<V> places(words.codes, kPlanes > 0);
          apply_signs<kPlanes>(out, words, places);
          store_group(out, first, second, places, tile + kGroup * g * kTileRows + h * kLanes);
          words.drop(1);
        }
      }
    }
  }
  template <ValueType kValues, int kPlanes>
  static void rebuild_planes(const CpuWeight& w, int64_t rb, int64_t kb, float* tile) {
    w.rank == 1 ? rebuild_ranked<kValues, 1, kPlanes>(w, rb, kb, tile)
                : rebuild_ranked<kValues, 2, kPlanes>(w, rb, kb, tile);
  }
  template <ValueType kValues>
  static void rebuild(const CpuWeight& w, int64_t rb, int64_t kb, float* tile) {
    switch (w.planes) {
      case 0: return rebuild_ranked<kValues, 0, 0>(w, rb, kb, tile);
      case 1: return rebuild_planes<kValues, 1>(w, rb, kb, tile);
      case 2: return rebuild_planes<kValues, 2>(w, rb, kb, tile);
      case 3: return rebuild_planes<kValues, 3>(w, rb, kb, tile);
    }
  }
  static void rebuild_any(const CpuWeight& w, int64_t rb, int64_t kb, float* tile) {
    switch (w.values) {
      case kFp16: return rebuild<kFp16>(w, rb, kb, tile);
      case kBf16: return rebuild<kBf16>(w, rb, kb, tile);
      case kInt8: return rebuild<kInt8>(w, rb, kb, tile);
      case kInt4: return rebuild<kInt4>(w, rb, kb, tile);
    }
  }
};

}  // namespace
}  // namespace slab
