// Many tokens with int8 activations: int8 weights of a block of the stream, 16 rows x 128 inputs,
// written once over a vector type V. A panel is [32 groups][16 rows][4 inputs], 2 KB, which stays
// in the first-level cache.
//
// V has, beside what Stream<V> reads the stream with: H and B, the same bytes as signed 16-bit and
// 8-bit numbers; lookup(table, code), a word for each lane by the low three bits of its code;
// place(bytes, order), whose byte k is byte order[k] of the lane, or 0 where order[k] is 0x80;
// mulhrs, (a b + 2^14) >> 15; sign(m, l), which is m, -m or 0 as l is positive, negative or 0.
#pragma once

#include "int8_product.h"

namespace slab {
namespace {

// Words by the number of a pattern: where each of the four bytes of a group comes from, byte 0 or 1
// of a pair, or nowhere. Two tables of eight, since some instruction sets read four bits.
alignas(64) constexpr uint32_t kKeptOrder[16] = {
    0x80800100, 0x80018000, 0x01808000, 0x80010080, 0x01800080, 0x01008080, 0, 0,
    0x80800100, 0x80018000, 0x01808000, 0x80010080, 0x01800080, 0x01008080, 0, 0};
alignas(64) constexpr uint32_t kPrunedOrder[16] = {
    0x01008080, 0x01800080, 0x80010080, 0x01808000, 0x80018000, 0x80800100, 0, 0,
    0x01008080, 0x01800080, 0x80010080, 0x01808000, 0x80018000, 0x80800100, 0, 0};

// Which entries a panel holds; the others are 0.
enum class Entries { merged, pruned };

template <class V, ValueType kValues, int kPlanes>
struct Panel {
  using F = typename V::F;
  using I = typename V::I;
  using S = typename V::S;
  using H = typename V::H;
  using Words = typename Stream<V>::template Words<kPlanes>;
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

  // The kept values of a group: bytes 0 and 1 of a lane. int4 values are times 16.
  static SLAB_INLINE I kept_pair(const Block& b, int g, I& nibbles) {
    if constexpr (kValues == kInt4) {
      if (g % 4 == 0) nibbles = V::load_words(b.values + 64 * (g / 4));
      const I pair = ((nibbles & 0x0Fu) << 4) | ((nibbles & 0xF0u) << 8);
      nibbles = nibbles >> 8;
      return pair;
    } else {
      return V::load_bytes(b.values + 32 * g) | V::load_bytes(b.values + 32 * g + 16) << 8;
    }
  }
  // The signs of a group's pruned positions, times their levels, at their places.
  static SLAB_INLINE I levels(const Words& words) {
    const I two = (I)((S)words.signs >> 31);
    I one = (I)((S)(words.codes << 28) >> 31);
    I first = I{} + 1u, second = I{} + 1u;
    if constexpr (kPlanes == 1) one = one ^ two;
    if constexpr (kPlanes > 1) {
      constexpr uint32_t kMask = (1u << (kPlanes - 1)) - 1u;
      first = uint32_t(most_level(kPlanes)) - ((words.levels & kMask) << 1);
      second = uint32_t(most_level(kPlanes)) - ((words.levels >> (kPlanes - 1) & kMask) << 1);
    }
    first = ((first ^ one) - one) & 0xFFu;
    second = ((second ^ two) - two) & 0xFFu;
    return V::place(first | second << 8, V::lookup(kPrunedOrder, words.codes));
  }
  // The pruned entries of a group in units of the panel. v: of the group's inputs, for each rank.
  static SLAB_INLINE I pruned(const H (*a)[4][kStrips], int s, int h, const int16_t* v,
                              int64_t v_stride, int64_t rank, I level) {
    H even = H{}, odd = H{};
    for (int64_t r = 0; r < rank; ++r) {
      even = even + V::mulhrs(a[r][s][h], V::pair(v + r * v_stride));
      odd = odd + V::mulhrs(a[r][s][h], V::pair(v + r * v_stride + 2));
    }
    if constexpr (kPlanes > 1) {
      even = even * ((H)((I)level << 8) >> 8);  // of what stands above, 16-bit numbers keep nothing
      odd = odd * ((H)level >> 8);
    }
    const I low = (I)(even + (int16_t)(kFraction / 2)) >> 8 & 0x00FF00FFu;
    const I high = (I)(odd + (int16_t)(kFraction / 2)) & 0xFF00FF00u;
    return kPlanes == 1 ? V::sign(low | high, level) : low | high;
  }

  template <Entries kEntries>
  static void build_groups(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                           const H (*a)[4][kStrips], uint8_t* panel) {
    const uint8_t* const at = w.stream + (rb * w.k_blocks + kb) * w.block_size;
    const int groups = w.group_size / kGroup;  // that share a scale
#pragma GCC unroll 16
    for (int h = 0; h < kStrips; ++h) {
      const Block b = Stream<V>::block_at(at, h, kValues, kPlanes);
      Words words{};
      words.start(b);
      I nibbles = I{};
      for (int g = 0; g < kGroups; ++g) {
        if (g % 8 == 0) words.load_eight(b, g / 8);
        I out = I{};
        if constexpr (kEntries == Entries::merged)
          out = V::place(kept_pair(b, g, nibbles), V::lookup(kKeptOrder, words.codes));
        if constexpr (kPlanes > 0)
          out = out | pruned(a, g / groups, h, t.v + kb * kInputs + kGroup * g,
                             w.k_blocks * kInputs, w.rank, levels(words));
        V::store_words(panel + 64 * g + 4 * kLanes * h, out);
        words.drop(1);
      }
    }
  }

  template <Entries kEntries>
  static void build(const CpuWeight& w, const Int8Tokens& t, int64_t rb, int64_t kb,
                    const H (*a)[4][kStrips], uint8_t* panel) {
    if constexpr (V::kQuads)
      V::template build<kValues, kPlanes, kEntries>(w, t, rb, kb, a, panel);
    else
      build_groups<kEntries>(w, t, rb, kb, a, panel);
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
        build<Entries::merged>(w, t, rb + b, kb, f[b].merged, panels + b * kPanelBytes);
        for (int s = 0; s < kInputs / kScaled; ++s) copy(f[b].unit[s], scales[s][b]);
      }
      Merged{panels}.multiply_all(t, kb, scales, sums, kStride);
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
        if (f[b].second) {
          second_factors(w, t, rb + b, kb, f[b]);
          build<Entries::pruned>(w, t, rb + b, kb, f[b].pruned, other);
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
