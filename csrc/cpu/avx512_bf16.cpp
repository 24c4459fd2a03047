// AVX-512 with its product of bf16 pairs: many tokens of bf16 are multiplied with a panel of the
// weight in bf16. All else is as in avx512.cpp.
#include "../launch.h"

#if defined(__AVX512BF16__)
#include "avx512.h"
#include "bf16_panel.h"
#include "tile.h"

namespace slab {
namespace {

// Rebuilds a Bf16Panel.
struct RebuildPairs {
  using V = Avx512;
  using F = V::F;

  // Two vectors as bf16, `first` in the low half.
  static SLAB_INLINE __m512i narrow(F first, F second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }

  // Both kept values of group g of a block, the first ones in the low half.
  template <ValueType kValues>
  static SLAB_INLINE __m512i kept(const Stream<V>::Block& block, int g, F scale) {
    if constexpr (kValues == kBf16) return _mm512_loadu_si512(block.values + 64 * g);
    const uint8_t* const values = block.values + 64 * (kValues == kInt4 ? g / 8 * 2 : 0);
    F first, second;
    Stream<V>::load_values<kValues>(values, kValues == kInt4 ? g % 8 : g, first, second);
    if constexpr (is_integer(kValues)) {
      first = first * scale;
      second = second * scale;
    }
    return narrow(first, second);
  }

  // What one group holds in the two row blocks at its two pruned positions, each with its sign or
  // level. u: that of each row block, v: that of the group's inputs.
  template <int kRank, int kPlanes>
  static SLAB_INLINE void pruned(const Stream<V>::Words<kPlanes> (&words)[2],
                                 const float* const (&u)[2], const float* v, int64_t rank,
                                 int64_t padded, __m512i (&out)[2]) {
    F first[2], second[2];
    for (int64_t r = 0; r < (kRank > 1 ? rank : 1); ++r) {
      const V::Apart table = V::apart_table(v + r * padded);
      for (int h = 0; h < 2; ++h) {
        const F factor = V::load(u[h] + r * kRows), one = V::first(table, words[h].codes),
                two = V::second(table, words[h].codes);
        first[h] = r ? V::fma(factor, one, first[h]) : factor * one;
        second[h] = r ? V::fma(factor, two, second[h]) : factor * two;
      }
    }
    for (int h = 0; h < 2; ++h) {
      if constexpr (kPlanes > 1) {
        const auto size = V::sizes<kPlanes>(words[h].levels);
        first[h] = first[h] * size.first;
        second[h] = second[h] * size.second;
      }
      // With one plane the table's sign is that of the first entry beside the second one.
      if constexpr (kPlanes == 1) first[h] = V::signed_by(first[h], words[h].signs);
      out[h] = narrow(first[h], V::signed_by(second[h], words[h].signs));
    }
  }

  // Where the two inputs of a cell come from, for every code: 0 the first kept value, 1 the second
  // one, 2 and 3 the pruned ones, times 16, because each of them is 16 lanes.
  static SLAB_INLINE __m512i sources(bool inputs_2_and_3) {
    constexpr int kFrom[6][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 2, 3, 1},
                                 {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 3, 0, 1}};
    alignas(64) int table[16] = {0};
    for (int id = 0; id < kPatterns; ++id) {
      const int at = inputs_2_and_3 ? 2 : 0;
      table[id] = table[id + 8] = 16 * (kFrom[id][at] | kFrom[id][at + 1] << 16);
    }
    return _mm512_load_si512(table);
  }

  template <ValueType kValues, int kRank, int kPlanes>
  static void rebuild_ranked(const CpuWeight& w, int64_t rb0, int64_t rb1, int64_t kb,
                             float* panel) {
    const int64_t padded = w.k_blocks * kInputs;
    const __m512i low = sources(false), high = sources(true),
                  lane = _mm512_mullo_epi32(
                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                      _mm512_set1_epi32(0x10001));
    const int64_t row_block[2] = {rb0, rb1};
    Stream<V>::Block block[2];
    Stream<V>::Words<kPlanes> words[2];
    const float* u[2] = {nullptr, nullptr};
    F scale[2] = {V::zero(), V::zero()};
    for (int h = 0; h < 2; ++h) {
      block[h] = Stream<V>::block_at(w.stream + (row_block[h] * w.k_blocks + kb) * w.block_size, 0,
                                     kValues, kPlanes);
      words[h].start(block[h]);
      if (kRank) u[h] = w.u + row_block[h] * w.rank * kRows;
    }
    for (int word = 0; word < kGroups / 8; ++word) {
      for (int h = 0; h < 2; ++h) {
        words[h].load_eight(block[h], word);
        if (is_integer(kValues) && 32 * word % w.group_size == 0)
          scale[h] =
              V::load_values<kBf16>(block[h].scales + 2 * kRows * (32 * word / w.group_size));
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int g = 8 * word + j;
        __m512i other[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if constexpr (kRank > 0)
          pruned<kRank, kPlanes>(words, u, w.v + kb * kInputs + kGroup * g, w.rank, padded, other);
        for (int h = 0; h < 2; ++h) {
          const __m512i code = (__m512i)words[h].codes, both = kept<kValues>(block[h], g, scale[h]);
          const __m512i at_low = _mm512_or_si512(_mm512_permutexvar_epi32(code, low), lane),
                        at_high = _mm512_or_si512(_mm512_permutexvar_epi32(code, high), lane);
          float* const to = panel + 2 * g * kTileRows + h * kRows;
          _mm512_storeu_si512(to, _mm512_permutex2var_epi16(both, at_low, other[h]));
          _mm512_storeu_si512(to + kTileRows, _mm512_permutex2var_epi16(both, at_high, other[h]));
          words[h].drop(1);
        }
      }
    }
  }
  template <ValueType kValues, int kPlanes>
  static void rebuild_planes(const CpuWeight& w, int64_t rb0, int64_t rb1, int64_t kb,
                             float* panel) {
    w.rank == 1 ? rebuild_ranked<kValues, 1, kPlanes>(w, rb0, rb1, kb, panel)
                : rebuild_ranked<kValues, 2, kPlanes>(w, rb0, rb1, kb, panel);
  }
  template <ValueType kValues>
  static void rebuild_values(const CpuWeight& w, int64_t rb0, int64_t rb1, int64_t kb,
                             float* panel) {
    switch (w.planes) {
      case 0: return rebuild_ranked<kValues, 0, 0>(w, rb0, rb1, kb, panel);
      case 1: return rebuild_planes<kValues, 1>(w, rb0, rb1, kb, panel);
      case 2: return rebuild_planes<kValues, 2>(w, rb0, rb1, kb, panel);
      case 3: return rebuild_planes<kValues, 3>(w, rb0, rb1, kb, panel);
    }
  }
  // Rebuilds 128 inputs of two row blocks as panel[cell][kTileRows].
  static void rebuild(const CpuWeight& w, int64_t rb0, int64_t rb1, int64_t kb, float* panel) {
    switch (w.values) {
      case kFp16: return rebuild_values<kFp16>(w, rb0, rb1, kb, panel);
      case kBf16: return rebuild_values<kBf16>(w, rb0, rb1, kb, panel);
      case kInt8: return rebuild_values<kInt8>(w, rb0, rb1, kb, panel);
      case kInt4: return rebuild_values<kInt4>(w, rb0, rb1, kb, panel);
    }
  }
};

struct PairProducts : Bf16Panel {
  static SLAB_INLINE __m512 multiply(__m512 weight, __m512 x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
  }
};

void tile(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
  Tile<Avx512>::tile_of<PairProducts>(w, t, t.pairs, begin, end);
}

}  // namespace

void Bf16Panel::rebuild(const CpuWeight& w, int64_t first, int64_t second, int64_t k_block,
                        float* panel) {
  RebuildPairs::rebuild(w, first, second, k_block, panel);
}

const CpuKernels* cpu_kernels_avx512_bf16() {
  static const CpuKernels kernels = [] {
    CpuKernels found = *cpu_kernels_avx512();
    found.name = "avx512_bf16";
    found.tile_bf16 = tile;
    found.lookup_tokens_bf16 = 3;
    return found;
  }();
  return &kernels;
}

}  // namespace slab
#else
namespace slab {
const CpuKernels* cpu_kernels_avx512_bf16() { return nullptr; }
}  // namespace slab
#endif
