// More tokens: 128 inputs x 32 rows are rebuilt in fp32, which stay in L1, and multiplied with
// every token before the next tile. An entry is either a kept value or u v times its sign or level.
// The adapter goes through the same product: Q is the weight of z = x Q, P are further inputs of y.
#pragma once

#include "stream.h"

namespace slab {
namespace {

constexpr int kTileRows = 2 * kRows;

template <class V>
struct Tile {
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
                                      I places) {
    if constexpr (kPlanes == 1) {
      // Bit 31 of `signs` is the second pruned position's sign, and r flips it for the first one.
      const I r = words.codes << 28;
      out[0] = V::signed_by(out[0], words.signs ^ r);
      out[1] = V::signed_by(out[1], words.signs ^ (r & places << 22));
      out[2] = V::signed_by(out[2], words.signs ^ (r & places << 21));
      out[3] = V::signed_by(out[3], words.signs);
    }
    if constexpr (kPlanes > 1) {
      const auto size = V::template sizes<kPlanes>(words.levels);
      const F one = V::signed_by(size.first, words.codes << 28);
      const F two = V::signed_by(size.second, words.signs);
      out[0] = out[0] * one;
      out[1] = out[1] * V::choose(places, 9, one, two);
      out[2] = out[2] * V::choose(places, 10, one, two);
      out[3] = out[3] * two;
    }
  }

  // Puts the kept values into their places and stores the group's four inputs.
  static SLAB_INLINE void store_group(F (&out)[kGroup], F first, F second, I places, float* to) {
    for (int i = 0; i < kGroup; ++i) {
      if (i < 3) out[i] = V::choose(places, i, first, out[i]);
      if (i > 0) out[i] = V::choose(places, 4 + i, second, out[i]);
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
          const I places = V::places(words.codes);
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

  // y[kTokens][kTileRows] += x[kTokens][length] tile[length][kTileRows]
  template <int kTokens>
  static void multiply_tokens(const float* tile, int64_t length, const float* x, int64_t x_stride,
                              float* y) {
    for (int c = 0; c < kTileRows; c += 2 * kLanes) {
      F acc[kTokens][2];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        acc[i][0] = V::load(y + i * kTileRows + c);
        acc[i][1] = V::load(y + i * kTileRows + c + kLanes);
      }
      for (int64_t k = 0; k < length; ++k) {
        const F a = V::load(tile + k * kTileRows + c),
                b = V::load(tile + k * kTileRows + c + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
          const F xk = V::broadcast(x + i * x_stride + k);
          acc[i][0] = V::fma(a, xk, acc[i][0]);
          acc[i][1] = V::fma(b, xk, acc[i][1]);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        V::store(y + i * kTileRows + c, acc[i][0]);
        V::store(y + i * kTileRows + c + kLanes, acc[i][1]);
      }
    }
  }
  template <int kTokens>
  static void multiply_rest(const float* tile, int64_t length, const float* x, int64_t x_stride,
                            int64_t tokens, float* y) {
    if constexpr (kTokens > 0) {
      if (tokens == kTokens)
        multiply_tokens<kTokens>(tile, length, x, x_stride, y);
      else
        multiply_rest<kTokens - 1>(tile, length, x, x_stride, tokens, y);
    }
  }
  static void multiply_tile(const float* tile, int64_t length, const float* x, int64_t x_stride,
                            int64_t tokens, float* y) {
    constexpr int kTokens = V::kTokens;
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * x_stride, y += kTokens * kTileRows)
      multiply_tokens<kTokens>(tile, length, x, x_stride, y);
    multiply_rest<kTokens - 1>(tile, length, x, x_stride, tokens, y);
  }

  // Copies rows [0, length) of a panel [..][16] into half of a tile.
  static void panel_tile(const void* data, bool half, int64_t at, int64_t length, float* tile) {
    for (int64_t k = 0; k < length; ++k)
      for (int h = 0; h < kStrips; ++h)
        V::store(tile + k * kTileRows + h * kLanes,
                 Stream<V>::panel(data, half, at + k * kRows + h * kLanes));
  }

  static void adapter_in(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    const int64_t padded = w.k_blocks * kInputs;
    alignas(64) float tile[kInputs * kTileRows];
    alignas(64) float y[V::kTokens * kTileRows];
    for (int64_t c = begin; c < end; ++c)
      for (int64_t token = 0; token < t.count; token += V::kTokens) {
        const int64_t left = t.count - token, tokens = left < V::kTokens ? left : V::kTokens;
        std::memset(y, 0, sizeof(y));
        for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
          for (int half = 0; half < 2; ++half)
            panel_tile(w.q, w.adapter_half, ((2 * c + half) * padded + kb * kInputs) * kRows,
                       kInputs, tile + half * kRows);
          multiply_tile(tile, kInputs, t.x + token * padded + kb * kInputs, padded, tokens, y);
        }
        for (int64_t i = 0; i < tokens; ++i)
          std::memcpy(t.z + (token + i) * w.adapter_padded + c * kTileRows, y + i * kTileRows,
                      4 * kTileRows);
      }
  }

  static void tile(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    const int64_t padded = w.k_blocks * kInputs;
    alignas(64) float tile[kInputs * kTileRows];
    alignas(64) float y[kTileTokens * kTileRows];
    for (int64_t rb = begin; rb < end; rb += 2) {
      const int both = rb + 1 < end ? 2 : 1;
      if (both == 1) std::memset(tile, 0, sizeof(tile));
      std::memset(y, 0, size_t(t.count) * kTileRows * 4);
      for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
        for (int half = 0; half < both; ++half) rebuild_any(w, rb + half, kb, tile + half * kRows);
        multiply_tile(tile, kInputs, t.x + kb * kInputs, padded, t.count, y);
      }
      for (int64_t j = 0; j < w.adapter_rank; j += kInputs) {
        const int64_t left = w.adapter_rank - j, length = left < kInputs ? left : kInputs;
        for (int half = 0; half < both; ++half)
          panel_tile(w.p, w.adapter_half, ((rb + half) * w.adapter_rank + j) * kRows, length,
                     tile + half * kRows);
        multiply_tile(tile, length, t.z + j, w.adapter_padded, t.count, y);
      }
      for (int64_t i = 0; i < t.count; ++i)
        for (int half = 0; half < both; ++half) {
          float* const out = y + i * kTileRows + half * kRows;
          if (w.bias)
            for (int h = 0; h < kRows; h += kLanes)
              V::store(out + h, V::load(out + h) + V::load(w.bias + (rb + half) * kRows + h));
          Stream<V>::store_rows(w, t, i, rb + half, out);
        }
    }
  }

  static void dequantize(const CpuWeight& w, void* out, int out_type, int64_t begin, int64_t end) {
    alignas(64) float tile[kInputs * kTileRows];
    float row[kInputs];
    const int64_t bytes = out_type == kFloat32 ? 4 : 2;
    for (int64_t rb = begin; rb < end; ++rb)
      for (int64_t kb = 0; kb < w.k_blocks; ++kb) {
        rebuild_any(w, rb, kb, tile);
        const int64_t rows = w.out_features - rb * kRows, columns = w.in_features - kb * kInputs;
        for (int64_t n = 0; n < kRows && n < rows; ++n) {
          for (int k = 0; k < kInputs; ++k) row[k] = tile[k * kTileRows + n];
          Stream<V>::narrow(row, out_type,
                            static_cast<uint8_t*>(out) +
                                ((rb * kRows + n) * w.in_features + kb * kInputs) * bytes,
                            columns < kInputs ? columns : kInputs);
        }
      }
  }
};

}  // namespace
}  // namespace slab
