// Few tokens: y = W x without rebuilding W.
//
// The 4 inputs of a group give three tables, x[first kept], x[second kept] and v x[pruned 1] +- v x[pruned 0], indexed
// by the 4-bit code of a lane: a group of 16 rows (64 weights) costs 3 lookups, 2 FMAs and one sign flip. u multiplies
// once at the end. Several row blocks share the tables of a group, two tokens the decoded codes and values.
//
// With several planes the two pruned positions are looked up apart and each is multiplied by its signed factor: one more
// lookup and FMA a token, and a lookup for each factor, whatever the number of planes. (One lookup and addition a plane
// would need as many with two planes, half as many again with three, and nothing of it is shared by tokens.)
#pragma once

#include "stream.h"

namespace slab {
namespace {

// Prefetch distance along a row block, bytes: two blocks of fp16, the best of 2048, 4096, 8192 within noise.
constexpr int kAhead = 4096;

template <class V>
struct Lookup {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kStrips = kRows / kLanes;  // vectors that make one row block

  static SLAB_INLINE void prefetch(const uint8_t* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
  }

  // T tokens x B row blocks share the tables of a group and the decoded codes, levels and values. P: planes, 0 if R is.
  template <int VT, int R, int P, int T, int B>
  static void lookup_blocks(const CpuWeight& w, const CpuTokens& t, int64_t rb, int64_t token) {
    constexpr int S = B * kStrips;
    constexpr bool scaled = is_integer(VT), kUnroll = R <= V::kUnrollRank;
    using Words = typename Stream<V>::template Words<P>;
    const int64_t padded = w.k_blocks * kInputs, size = w.block_size, row_bytes = w.k_blocks * size;
    const uint8_t* const base = w.stream + rb * row_bytes;
    F acc[T][S], low[T][S][R ? R : 1];
    for (int i = 0; i < T; ++i)
      for (int s = 0; s < S; ++s) {
        acc[i][s] = V::zero();
        for (int r = 0; r < R; ++r) low[i][s][r] = V::zero();
      }
    const float* const x = t.x + token * padded;
    const float* const xv = t.xv + token * R * padded;
    for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
      typename Stream<V>::Block blocks[S];
      Words words[S];
      F sum[T][S];
      for (int s = 0; s < S; ++s) {
        const uint8_t* const at = base + s / kStrips * row_bytes + kb * size;
        if (s % kStrips == 0) prefetch(at + kAhead, size);
        blocks[s] = Stream<V>::block_at(at, s % kStrips, VT, P);
        words[s].start(blocks[s]);
        if constexpr (scaled)
          for (int i = 0; i < T; ++i) sum[i][s] = V::zero();
      }
      for (int word = 0; word < kGroups / 8; ++word) {
        for (int s = 0; s < S; ++s) words[s].load_eight(blocks[s], word);
        for (int half = 0; half < 2; ++half) {
          I nibbles[S];
          if constexpr (VT == kInt4)
            for (int s = 0; s < S; ++s) nibbles[s] = V::load_words(blocks[s].values + 64 * (2 * word + half));
          // Group j of these four; the words of a strip still hold `behind` groups before it.
          const auto group = [&](int j, int behind) __attribute__((always_inline)) {
            const int g = 8 * word + 4 * half + j;
            const int64_t k = kb * kInputs + kGroup * g;
            typename V::Kept kept[T];
            typename V::Pruned pruned[T][R ? R : 1];
            typename V::Apart apart[T][R ? R : 1];
            for (int i = 0; i < T; ++i) {
              kept[i] = V::kept_table(x + i * padded + k);
              for (int r = 0; r < R; ++r) {
                const float* const at = xv + (i * R + r) * padded + k;
                if constexpr (P == 1) pruned[i][r] = V::pruned_table(at);
                if constexpr (P > 1) apart[i][r] = V::apart_table(at);
              }
            }
            for (int s = 0; s < S; ++s) {
              Words now = words[s];
              now.drop(behind);
              F first, second;
              if constexpr (VT == kInt4) {
                first = V::from_int4(nibbles[s], 8 * behind);
                second = V::from_int4(nibbles[s], 8 * behind + 4);
              } else {
                constexpr int bytes = VT == kInt8 ? 16 : 32;
                first = V::template load_values<VT>(blocks[s].values + 2 * bytes * g);
                second = V::template load_values<VT>(blocks[s].values + 2 * bytes * g + bytes);
              }
              for (int i = 0; i < T; ++i) {
                F& to = scaled ? sum[i][s] : acc[i][s];
                to = V::fma(first, V::first(kept[i], now.codes), to);
                to = V::fma(second, V::second(kept[i], now.codes), to);
              }
              if constexpr (P == 1)
                for (int i = 0; i < T; ++i)
                  for (int r = 0; r < R; ++r)
                    low[i][s][r] = low[i][s][r] + V::pruned(pruned[i][r], now.codes, now.signs);
              if constexpr (P > 1) {
                const auto size = V::template sizes<P>(now.levels);
                const F one = V::kSignedTable ? size.first : V::signed_by(size.first, now.codes << 28);
                const F two = V::signed_by(size.second, now.signs);
                for (int i = 0; i < T; ++i)
                  for (int r = 0; r < R; ++r) {
                    F& to = low[i][s][r];
                    to = V::fma(one, V::first(apart[i][r], now.codes), to);
                    to = V::fma(two, V::second(apart[i][r], now.codes), to);
                  }
              }
              if constexpr (!kUnroll) {
                words[s].drop(1);
                if constexpr (VT == kInt4) nibbles[s] = nibbles[s] >> 8;
              }
            }
          };
          if constexpr (kUnroll) {
            group(0, 0), group(1, 1), group(2, 2), group(3, 3);
            for (int s = 0; s < S; ++s) words[s].drop(4);
          } else {
#pragma GCC unroll 2
            for (int j = 0; j < 4; ++j) group(j, 0);
          }
        }
        if constexpr (scaled) {
          const int done = 32 * (word + 1);
          if (done % w.group_size == 0)
            for (int s = 0; s < S; ++s) {
              const F scale = V::template load_values<kBf16>(blocks[s].scales + 2 * kRows * (done / w.group_size - 1));
              for (int i = 0; i < T; ++i) {
                acc[i][s] = V::fma(scale, sum[i][s], acc[i][s]);
                sum[i][s] = V::zero();
              }
            }
        }
      }
    }
    for (int i = 0; i < T; ++i)
      for (int b = 0; b < B; ++b) {
        float out[kRows];
        for (int h = 0; h < kStrips; ++h) {
          const int s = b * kStrips + h;
          F y = acc[i][s];
          for (int r = 0; r < R; ++r)
            y = V::fma(V::load(w.u + ((rb + b) * R + r) * kRows + h * kLanes), low[i][s][r], y);
          const float* const z = t.z + (token + i) * w.adapter_padded;
          for (int64_t j = 0; j < w.adapter_rank; ++j)
            y = V::fma(Stream<V>::panel(w.p, w.adapter_half, ((rb + b) * w.adapter_rank + j) * kRows + h * kLanes),
                       V::broadcast(z + j), y);
          if (w.bias) y = y + V::load(w.bias + (rb + b) * kRows + h * kLanes);
          V::store(out + h * kLanes, y);
        }
        Stream<V>::store_rows(w, t, token + i, rb + b, out);
      }
  }

  template <int VT, int R, int P>
  static void lookup_range(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    constexpr int B = V::kLookupBlocks;
    for (int64_t rb = begin; rb < end;) {
      const bool wide = rb + B <= end;
      int64_t token = 0;
      if constexpr (R <= (P > 1 ? 2 : V::kPairRank))  // rank 4 and two vectors a table: no room for a second token
        for (; token + 2 <= t.count; token += 2) {
          if (wide)
            for (int b = 0; b < B; b += V::kPairBlocks) lookup_blocks<VT, R, P, 2, V::kPairBlocks>(w, t, rb + b, token);
          else
            lookup_blocks<VT, R, P, 2, 1>(w, t, rb, token);
        }
      for (; token < t.count; ++token) {
        if (wide)
          lookup_blocks<VT, R, P, 1, B>(w, t, rb, token);
        else
          lookup_blocks<VT, R, P, 1, 1>(w, t, rb, token);
      }
      rb += wide ? B : 1;
    }
  }
  template <int VT, int R>
  static void lookup_planes(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    switch (w.planes) {
      case 1: return lookup_range<VT, R, 1>(w, t, begin, end);
      case 2: return lookup_range<VT, R, 2>(w, t, begin, end);
      case 3: return lookup_range<VT, R, 3>(w, t, begin, end);
    }
  }
  template <int VT>
  static void lookup_rank(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    switch (w.rank) {
      case 0: return lookup_range<VT, 0, 0>(w, t, begin, end);
      case 1: return lookup_planes<VT, 1>(w, t, begin, end);
      case 2: return lookup_planes<VT, 2>(w, t, begin, end);
      case 4: return lookup_planes<VT, 4>(w, t, begin, end);
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
