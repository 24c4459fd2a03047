// Few tokens: y = W x without rebuilding W.
//
// The 4 inputs of a group give three tables, x[first kept], x[second kept] and v x[pruned 1] +- v
// x[pruned 0], indexed by the 4-bit code of a lane: a group of 16 rows (64 weights) costs 3
// lookups, 2 FMAs and one sign flip. u multiplies once, at the end. Several row blocks share the
// tables of a group, two tokens share the decoded codes and values.
//
// With several planes the two pruned positions are looked up apart and each is multiplied by its
// signed factor: one more lookup and FMA per token, and a lookup for each factor, whatever the
// number of planes. (One lookup and addition per plane would need as many with two planes and half
// as many again with three, and tokens would share nothing of it.)
#pragma once

#include "stream.h"

namespace slab {
namespace {

static SLAB_INLINE void prefetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

// y of kTokens tokens and kBlocks row blocks. kPlanes is 0 if kRank is. A strip is a vector of
// rows.
template <class V, ValueType kValues, int kRank, int kPlanes, int kTokens, int kBlocks>
struct LookupBlocks {
  using F = typename V::F;
  using I = typename V::I;
  using Words = typename Stream<V>::template Words<kPlanes>;
  static constexpr int kBlockStrips = Stream<V>::kStrips, kStrips = kBlocks * kBlockStrips;
  static constexpr int kRanks = kRank ? kRank : 1;  // of arrays
  static constexpr bool kScaled = is_integer(kValues);
  static constexpr bool kUnrolled = kRank <= V::kUnrollRank;

  struct Accumulators {
    F sum[kTokens][kStrips];
    F signs[kTokens][kStrips][kRanks];  // the sign term of each rank, not yet multiplied by u

    SLAB_INLINE void clear() {
      for (int i = 0; i < kTokens; ++i)
        for (int s = 0; s < kStrips; ++s) {
          sum[i][s] = V::zero();
          for (int r = 0; r < kRank; ++r) signs[i][s][r] = V::zero();
        }
    }
  };

  // What is read of one K-block.
  struct KBlock {
    typename Stream<V>::Block at[kStrips];
    Words words[kStrips];
    I nibbles[kStrips];             // int4: the values of four groups
    F scale_sum[kTokens][kStrips];  // int8, int4: sums under the current scale

    SLAB_INLINE void open(const CpuWeight& w, int64_t row_block, int64_t k_block) {
      const int64_t row_bytes = w.k_blocks * w.block_size;
      const uint8_t* const first = w.stream + row_block * row_bytes;
      for (int s = 0; s < kStrips; ++s) {
        const uint8_t* const block = first + s / kBlockStrips * row_bytes + k_block * w.block_size;
        if (s % kBlockStrips == 0 && w.prefetch) prefetch(block + w.prefetch, w.block_size);
        at[s] = Stream<V>::block_at(block, s % kBlockStrips, kValues, kPlanes);
        words[s].start(at[s]);
        if constexpr (kScaled)
          for (int i = 0; i < kTokens; ++i) scale_sum[i][s] = V::zero();
      }
    }
    SLAB_INLINE void load_eight(int word) {
      for (int s = 0; s < kStrips; ++s) words[s].load_eight(at[s], word);
    }
    SLAB_INLINE void load_four(int quarter) {
      if constexpr (kValues == kInt4)
        for (int s = 0; s < kStrips; ++s) nibbles[s] = V::load_words(at[s].values + 64 * quarter);
    }
    // The values of group g; the words of a strip still hold `behind` groups before it.
    SLAB_INLINE void load_values(int s, int g, int behind, F& first, F& second) const {
      if constexpr (kValues == kInt4) {
        first = V::from_int4(nibbles[s], 8 * behind);
        second = V::from_int4(nibbles[s], 8 * behind + 4);
      } else {
        constexpr int kBytes = kValues == kInt8 ? 16 : 32;
        first = V::template load_values<kValues>(at[s].values + 2 * kBytes * g);
        second = V::template load_values<kValues>(at[s].values + 2 * kBytes * g + kBytes);
      }
    }
    SLAB_INLINE void drop_one(int s) {
      words[s].drop(1);
      if constexpr (kValues == kInt4) nibbles[s] = nibbles[s] >> 8;
    }
  };

  // The tables of one group of inputs.
  struct GroupTables {
    typename V::Kept kept[kTokens];
    typename V::Pruned pruned[kTokens][kRanks];  // of one plane
    typename V::Apart apart[kTokens][kRanks];    // of several planes

    // x and xv: the group's inputs of the first token; rows are `padded` apart.
    SLAB_INLINE void make(const float* x, const float* xv, int64_t padded) {
      for (int i = 0; i < kTokens; ++i) {
        kept[i] = V::kept_table(x + i * padded);
        for (int r = 0; r < kRank; ++r) {
          const float* const at = xv + (i * kRank + r) * padded;
          if constexpr (kPlanes == 1) pruned[i][r] = V::pruned_table(at);
          if constexpr (kPlanes > 1) apart[i][r] = V::apart_table(at);
        }
      }
    }
  };

  // Adds group g of the K-block to the sums.
  static SLAB_INLINE void accumulate(Accumulators& to, KBlock& block, const GroupTables& tables,
                                     int g, int behind) {
    for (int s = 0; s < kStrips; ++s) {
      Words now = block.words[s];
      now.drop(behind);
      F first, second;
      block.load_values(s, g, behind, first, second);
      for (int i = 0; i < kTokens; ++i) {
        F& sum = kScaled ? block.scale_sum[i][s] : to.sum[i][s];
        sum = V::fma(first, V::first(tables.kept[i], now.codes), sum);
        sum = V::fma(second, V::second(tables.kept[i], now.codes), sum);
      }
      if constexpr (kPlanes > 0) add_signs(to, tables, now, s);
      if constexpr (!kUnrolled) block.drop_one(s);
    }
  }

  static SLAB_INLINE void add_signs(Accumulators& to, const GroupTables& tables, const Words& now,
                                    int s) {
    if constexpr (kPlanes == 1) {
      for (int i = 0; i < kTokens; ++i)
        for (int r = 0; r < kRank; ++r)
          to.signs[i][s][r] =
              to.signs[i][s][r] + V::pruned(tables.pruned[i][r], now.codes, now.signs);
    } else {
      const auto size = V::template sizes<kPlanes>(now.levels);
      const F one = V::kSignedTable ? size.first : V::signed_by(size.first, now.codes << 28);
      const F two = V::signed_by(size.second, now.signs);
      for (int i = 0; i < kTokens; ++i)
        for (int r = 0; r < kRank; ++r) {
          F& sum = to.signs[i][s][r];
          sum = V::fma(one, V::first(tables.apart[i][r], now.codes), sum);
          sum = V::fma(two, V::second(tables.apart[i][r], now.codes), sum);
        }
    }
  }

  // After the eight groups of a word: adds the sums of a scale that ends here, times the scale.
  static SLAB_INLINE void apply_scale(Accumulators& to, KBlock& block, int word, int group_size) {
    const int done = 32 * (word + 1);
    if (done % group_size == 0)
      for (int s = 0; s < kStrips; ++s) {
        const uint8_t* const scales = block.at[s].scales;
        const F scale =
            V::template load_values<kBf16>(scales + 2 * kRows * (done / group_size - 1));
        for (int i = 0; i < kTokens; ++i) {
          to.sum[i][s] = V::fma(scale, block.scale_sum[i][s], to.sum[i][s]);
          block.scale_sum[i][s] = V::zero();
        }
      }
  }

  // Multiplies the sign term by u, adds the adapter and the bias, and stores.
  static SLAB_INLINE void finish(const Accumulators& sums, const CpuWeight& w, const CpuTokens& t,
                                 int64_t row_block, int64_t token) {
    for (int i = 0; i < kTokens; ++i)
      for (int b = 0; b < kBlocks; ++b) {
        const int64_t block = row_block + b;
        float out[kRows];
        for (int h = 0; h < kBlockStrips; ++h) {
          const int s = b * kBlockStrips + h;
          F y = sums.sum[i][s];
          for (int r = 0; r < kRank; ++r)
            y = V::fma(V::load(w.u + (block * kRank + r) * kRows + h * V::kLanes),
                       sums.signs[i][s][r], y);
          const float* const z = t.z + (token + i) * w.adapter_padded;
          for (int64_t j = 0; j < w.adapter_rank; ++j) {
            const int64_t at = (block * w.adapter_rank + j) * kRows + h * V::kLanes;
            y = V::fma(Stream<V>::panel(w.p, w.adapter_half, at), V::broadcast(z + j), y);
          }
          if (w.bias) y = y + V::load(w.bias + block * kRows + h * V::kLanes);
          V::store(out + h * V::kLanes, y);
        }
        Stream<V>::store_rows(w, t, token + i, block, out);
      }
  }

  // Rows [16 row_block, 16 (row_block + kBlocks)) of tokens [token, token + kTokens).
  static void multiply(const CpuWeight& w, const CpuTokens& t, int64_t row_block, int64_t token) {
    const int64_t padded = w.k_blocks * kInputs;
    const float* const x = t.x + token * padded;
    const float* const xv = t.xv + token * kRank * padded;
    Accumulators sums;
    sums.clear();
    for (int64_t k_block = 0; k_block < w.k_blocks; ++k_block) {
      KBlock block;
      block.open(w, row_block, k_block);
      for (int word = 0; word < kGroups / 8; ++word) {
        block.load_eight(word);
        for (int half = 0; half < 2; ++half) {
          block.load_four(2 * word + half);
          const auto group = [&](int j, int behind) __attribute__((always_inline)) {
            const int g = 8 * word + 4 * half + j;
            const int64_t k = k_block * kInputs + kGroup * g;
            GroupTables tables;
            tables.make(x + k, xv + k, padded);
            accumulate(sums, block, tables, g, behind);
          };
          if constexpr (kUnrolled) {
            group(0, 0), group(1, 1), group(2, 2), group(3, 3);
            for (int s = 0; s < kStrips; ++s) block.words[s].drop(4);
          } else {
#pragma GCC unroll 2
            for (int j = 0; j < 4; ++j) group(j, 0);
          }
        }
        if constexpr (kScaled) apply_scale(sums, block, word, w.group_size);
      }
    }
    finish(sums, w, t, row_block, token);
  }
};

template <class V>
struct Lookup {
  template <ValueType kValues, int kRank, int kPlanes>
  static void lookup_range(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    constexpr int kBlocks = V::kLookupBlocks, kPairBlocks = V::kPairBlocks;
    // With a higher rank, or two vectors per table, a second token finds no room in the registers.
    constexpr bool kPairs = kRank <= (kPlanes > 1 ? 2 : V::kPairRank);
    for (int64_t block = begin; block < end;) {
      const bool wide = block + kBlocks <= end;
      int64_t token = 0;
      if constexpr (kPairs)
        for (; token + 2 <= t.count; token += 2) {
          if (wide)
            for (int b = 0; b < kBlocks; b += kPairBlocks)
              LookupBlocks<V, kValues, kRank, kPlanes, 2, kPairBlocks>::multiply(w, t, block + b,
                                                                                 token);
          else
            LookupBlocks<V, kValues, kRank, kPlanes, 2, 1>::multiply(w, t, block, token);
        }
      for (; token < t.count; ++token) {
        if (wide)
          LookupBlocks<V, kValues, kRank, kPlanes, 1, kBlocks>::multiply(w, t, block, token);
        else
          LookupBlocks<V, kValues, kRank, kPlanes, 1, 1>::multiply(w, t, block, token);
      }
      block += wide ? kBlocks : 1;
    }
  }
  template <ValueType kValues, int kRank>
  static void lookup_planes(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    switch (w.planes) {
      case 1: return lookup_range<kValues, kRank, 1>(w, t, begin, end);
      case 2: return lookup_range<kValues, kRank, 2>(w, t, begin, end);
      case 3: return lookup_range<kValues, kRank, 3>(w, t, begin, end);
    }
  }
  template <ValueType kValues>
  static void lookup_rank(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    switch (w.rank) {
      case 0: return lookup_range<kValues, 0, 0>(w, t, begin, end);
      case 1: return lookup_planes<kValues, 1>(w, t, begin, end);
      case 2: return lookup_planes<kValues, 2>(w, t, begin, end);
      case 4: return lookup_planes<kValues, 4>(w, t, begin, end);
    }
  }
  static void lookup(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    switch (w.values) {
      case kFp16: return lookup_rank<kFp16>(w, t, begin, end);
      case kBf16: return lookup_rank<kBf16>(w, t, begin, end);
      case kInt8: return lookup_rank<kInt8>(w, t, begin, end);
      case kInt4: return lookup_rank<kInt4>(w, t, begin, end);
    }
  }
};

}  // namespace
}  // namespace slab
