// Many tokens with int8 activations: int8 weights of a block of the stream, 16 rows x 128 inputs,
// written once over a vector type V. A panel is [32 groups][16 rows][4 inputs], 2 KB, which stays
// in the first-level cache.
//
// V has, beside what Stream<V> reads the stream with: H and S, vectors of signed 16-bit and 32-bit
// integers; to_int, the nearest integers; build, which writes the panel of a block.
#pragma once

#include "int8_product.h"

namespace slab {
namespace {

// Which entries a panel holds; the others are 0.
enum class Entries { merged, pruned };

template <class V, ValueType kValues, int kPlanes>
struct Panel {
  using F = typename V::F;
  using I = typename V::I;
  using S = typename V::S;
  using H = typename V::H;
  using Block = typename Stream<V>::Block;
  static constexpr int kLanes = V::kLanes, kStrips = Stream<V>::kStrips;
  static constexpr float kValueUnit = kValues == kInt4 ? 0.0625f : 1.0f;  // of a scale

  // The units of a block's panels, and u over them: what `merged` and `pruned` entries are made of.
  struct Factors {
    H merged[kManyRank][4][kStrips], pruned[kManyRank][4][kStrips];
    F unit[4][kStrips];      // of the merged panel, for each scale
    F pruned_unit[kStrips];  // of the second panel
    S apart[4][kStrips];     // which rows' pruned entries are there
    bool second;             // whether there is one
  };

  static SLAB_INLINE F splat(float x) { return V::broadcast(&x); }
  static SLAB_INLINE void copy(const F (&from)[kStrips], F (&to)[kStrips]) {
#pragma GCC unroll 16
    for (int h = 0; h < kStrips; ++h) to[h] = from[h];
  }
  static SLAB_INLINE F where(S mask, F yes, F no) { return (F)((mask & (S)yes) | (~mask & (S)no)); }
  static SLAB_INLINE F size(F x) { return (F)((I)x & 0x7FFFFFFFu); }
  static SLAB_INLINE H pairs(F x) {
    const I n = V::to_int(x);
    return (H)((n & 0xFFFFu) | n << 16);
  }

  static void read_units(const CpuWeight& w, int64_t rb, int64_t kb, Factors& f) {
#pragma GCC unroll 16
    for (int h = 0; h < kStrips; ++h) {
      const uint8_t* const at = w.stream + (rb * w.k_blocks + kb) * w.block_size;
      const Block b = Stream<V>::block_at(at, h, kValues, kPlanes);
      for (int s = 0; s < kInputs / w.group_size; ++s)
        f.unit[s][h] = V::template load_values<kBf16>(b.scales + 2 * kRows * s) * splat(kValueUnit);
    }
  }
  static void factors(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb, Factors& f) {
    read_units(w, rb, kb, f);
    f.second = false;
    if constexpr (kPlanes > 0) {
      const float* const u = w.u + rb * w.rank * kRows;
#pragma GCC unroll 16
      for (int h = 0; h < kStrips; ++h) {
        F most = V::zero();
        for (int64_t r = 0; r < w.rank; ++r)
          most = most +
                 size(V::load(u + r * kRows + h * kLanes)) * splat(t.v_most[r * w.k_blocks + kb]);
        most = most * splat(level_unit(kPlanes) * float(most_level(kPlanes)));
        f.pruned_unit[h] = most * splat(1.0f / float(kMostUnits));
        for (int s = 0; s < kInputs / w.group_size; ++s) {
          const F unit = size(f.unit[s][h]);
          const S fits = (unit > splat(0x1p-100f)) & (most <= unit * splat(float(kMostUnits))) &
                         (most >= unit * splat(float(least_units(kValues))));
          const S none = most == V::zero();
          const bool padding = kb * kInputs + s * w.group_size >= w.in_features;
          f.apart[s][h] = ~(fits | none);
          f.second = f.second || !(padding || V::all(fits | none));
          for (int64_t r = 0; r < w.rank; ++r)
            f.merged[r][s][h] =
                pairs(where(fits, product(w, t, rb, kb, r, h) / f.unit[s][h], V::zero()) *
                      splat(level_unit(kPlanes) * float(kFraction)));
        }
      }
    }
  }
  // `pruned`, where there is a second panel.
  static void second_factors(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                             Factors& f) {
#pragma GCC unroll 16
    for (int h = 0; h < kStrips; ++h)
      for (int s = 0; s < kInputs / w.group_size; ++s)
        for (int64_t r = 0; r < w.rank; ++r)
          f.pruned[r][s][h] = pairs(
              where(f.apart[s][h], product(w, t, rb, kb, r, h) / f.pruned_unit[h], V::zero()) *
              splat(level_unit(kPlanes) * float(kFraction)));
  }
  // u times the largest v of the block.
  static SLAB_INLINE F product(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                               int64_t r, int h) {
    return V::load(w.u + (rb * w.rank + r) * kRows + h * kLanes) *
           splat(t.v_most[r * w.k_blocks + kb]);
  }

  // Many tokens: one panel, of kBlocks row blocks at once, and a second one where it is needed.
  template <int kBlocks, int kScaled>
  static void many_blocks(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t rb) {
    constexpr int kStride = kBlocks * kRows, kSpan = kScaled < kManyPiece ? kScaled : kManyPiece;
    alignas(64) uint8_t panels[kBlocks * kPanelBytes], other[kPanelBytes];
    alignas(64) float sums[kManyAtOnce * kStride];
    Factors f[kBlocks];
    using Merged = PanelProduct<V, kBlocks, kSpan, kScaled>;
    using Pruned = PanelProduct<V, 1, kManyPiece, kInputs>;
    std::memset(sums, 0, size_t(t.count) * kStride * 4);
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      typename Merged::Scales scales;
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) factors(w, t, rb + b, kb, f[b]);
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        // The products between two blocks are too long for the hardware to see a stream.
        const uint8_t* const next = w.stream + ((rb + b) * w.k_blocks + kb + 1) * w.block_size;
        for (int64_t i = 0; i < w.block_size; i += 64) __builtin_prefetch(next + i, 0, 3);
        V::template build<kValues, kPlanes, Entries::merged>(w, t, rb + b, kb, f[b].merged,
                                                             panels + b * kPanelBytes);
        for (int s = 0; s < kInputs / kScaled; ++s) copy(f[b].unit[s], scales[s][b]);
      }
      Merged{panels}.multiply_all(t, kb, scales, sums, kStride);
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
        if (f[b].second) {
          second_factors(w, t, rb + b, kb, f[b]);
          V::template build<kValues, kPlanes, Entries::pruned>(w, t, rb + b, kb, f[b].pruned,
                                                               other);
          typename Pruned::Scales same;
          copy(f[b].pruned_unit, same[0][0]);
          Pruned{other}.multiply_all(t, kb, same, sums + b * kRows, kStride);
        }
    }
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b)
      end.finish(w, *end.tokens, rb + b, 0, t.count, sums + b * kRows, kStride);
  }
  template <int kScaled>
  static void many_scaled(const CpuWeight& w, const Int8Tokens& t, const Int8End& end,
                          int64_t first, int64_t last) {
    constexpr int kBlocks = V::kPanelBlocks;
    int64_t rb = first;
    for (; rb + kBlocks <= last; rb += kBlocks) many_blocks<kBlocks, kScaled>(w, t, end, rb);
    for (; rb < last; ++rb) many_blocks<1, kScaled>(w, t, end, rb);
  }
  static void many(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
                   int64_t last) {
    if (w.group_size == kInputs)
      many_scaled<kInputs>(w, t, end, first, last);
    else if (w.group_size == kManyPiece)
      many_scaled<kManyPiece>(w, t, end, first, last);
    else
      many_scaled<kPiece>(w, t, end, first, last);
  }
};

template <class V>
void panels(const CpuWeight& w, const Int8Tokens& t, const Int8End& end, int64_t first,
            int64_t last) {
  for_integers(w, [&](auto values, auto planes) {
    Panel<V, ValueType(values.value), planes.value>::many(w, t, end, first, last);
  });
}

}  // namespace
}  // namespace slab
