// More tokens: a panel of the weight, 32 rows wide, is rebuilt in the first caches and multiplied
// with every token before the next panel. The adapter goes through the same product: Q is the
// weight of z = x Q, P are further inputs of y.
//
// x comes in blocks of a few tokens, in each of which the tokens' cells of one input stand side by
// side (launch.h): a product then reads it in one piece. With one row after the other, all rows of
// a weight whose inputs are a multiple of 1024 would fall into the same sets of the cache.
#pragma once

#include "rebuild.h"

namespace slab {
namespace {

// A panel of fp32: a cell is one input. Other panels have the same members.
template <class V>
struct Fp32Panel {
  using F = typename V::F;
  static constexpr int kCellInputs = 1;        // inputs of a cell, which takes 4 bytes
  static constexpr int kPanelBlocks = 1;       // K-blocks of a panel
  static constexpr int kPanelCells = kInputs;  // rows of kTileRows numbers that it takes
  static SLAB_INLINE F multiply(F weight, F x, F sum) { return V::fma(weight, x, sum); }
  // Rebuilds 128 inputs of row blocks `first` and `second` as panel[cell][kTileRows].
  static void rebuild(const CpuWeight& w, int64_t first, int64_t second, int64_t k_block,
                      float* panel) {
    Rebuild<V>::rebuild_any(w, first, k_block, panel);
    Rebuild<V>::rebuild_any(w, second, k_block, panel + kRows);
  }
};

template <class V>
struct Tile {
  using F = typename V::F;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kStrips = kRows / kLanes;  // vectors that make one row block

  // sums[kTokens][kTileRows] += x[cells][kTokens] panel[cells][kTileRows]
  template <class Panel, int kTokens>
  static void multiply_tokens(const float* panel, int64_t cells, const float* x, float* sums) {
    for (int c = 0; c < kTileRows; c += 2 * kLanes) {
      F acc[kTokens][2];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        acc[i][0] = V::load(sums + i * kTileRows + c);
        acc[i][1] = V::load(sums + i * kTileRows + c + kLanes);
      }
      for (int64_t k = 0; k < cells; ++k) {
        const F a = V::load(panel + k * kTileRows + c),
                b = V::load(panel + k * kTileRows + c + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
          const F xk = V::broadcast(x + k * kTokens + i);
          acc[i][0] = Panel::multiply(a, xk, acc[i][0]);
          acc[i][1] = Panel::multiply(b, xk, acc[i][1]);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        V::store(sums + i * kTileRows + c, acc[i][0]);
        V::store(sums + i * kTileRows + c + kLanes, acc[i][1]);
      }
    }
  }
  template <class Panel, int kTokens>
  static void multiply_block(const float* panel, int64_t cells, const float* x, int64_t tokens,
                             float* sums) {
    if constexpr (kTokens > 0) {
      if (tokens == kTokens)
        multiply_tokens<Panel, kTokens>(panel, cells, x, sums);
      else
        multiply_block<Panel, kTokens - 1>(panel, cells, x, tokens, sums);
    }
  }
  // Multiplies cells [first, first + cells) of every token, of `all` cells that each has.
  template <class Panel>
  static void multiply(const float* panel, int64_t first, int64_t cells, const float* x,
                       int64_t all, const CpuTokens& t, float* sums) {
    const TokenBlocks blocks(t.count, t.block_tokens);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t at = blocks.begin(b), tokens = blocks.begin(b + 1) - at;
      multiply_block<Panel, V::kTokens>(panel, cells, x + at * all + first * tokens, tokens,
                                        sums + at * kTileRows);
    }
  }

  // Copies rows [0, length) of P or Q, which are [..][16], into half of a panel.
  static void copy_panel(const void* data, bool half, int64_t at, int64_t length, float* panel) {
    for (int64_t k = 0; k < length; ++k)
      for (int h = 0; h < kStrips; ++h)
        V::store(panel + k * kTileRows + h * kLanes,
                 Stream<V>::panel(data, half, at + k * kRows + h * kLanes));
  }

  static void adapter_in(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    const int64_t padded = w.k_blocks * kInputs;
    const TokenBlocks blocks(t.count, t.block_tokens);
    alignas(64) float panel[kInputs * kTileRows];
    alignas(64) float sums[kTileTokens * kTileRows];
    for (int64_t c = begin; c < end; ++c) {
      std::memset(sums, 0, size_t(t.count) * kTileRows * 4);
      for (int64_t k = 0; k < padded; k += kInputs) {
        for (int half = 0; half < 2; ++half)
          copy_panel(w.q, w.adapter_half, ((2 * c + half) * padded + k) * kRows, kInputs,
                     panel + half * kRows);
        multiply<Fp32Panel<V>>(panel, k, kInputs, t.x, padded, t, sums);
      }
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t at = blocks.begin(b), tokens = blocks.begin(b + 1) - at;
        float* const z = t.z + at * w.adapter_padded + c * kTileRows * tokens;
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t j = 0; j < kTileRows; ++j)
            z[j * tokens + i] = sums[(at + i) * kTileRows + j];
      }
    }
  }

  // Asks for a part of the stream, which is to arrive while a panel is multiplied.
  static SLAB_INLINE void prefetch(const CpuWeight& w, int64_t rb, int64_t kb, int64_t blocks) {
    const uint8_t* const at = w.stream + (rb * w.k_blocks + kb) * w.block_size;
    for (int64_t i = 0; i < blocks * w.block_size; i += 64) __builtin_prefetch(at + i, 0, 2);
  }

  // A product of panels for `tile_with`: the cells of every token times those of a panel.
  template <class Panel>
  struct Cells {
    const CpuTokens& t;
    const float* x;
    int64_t all;  // cells of a token
    int64_t rows() const { return t.count; }
    void add(const float* panel, int64_t first, int64_t cells, float* sums) {
      multiply<Panel>(panel, first, cells, x, all, t, sums);
    }
    void settle(float*) {}
  };

  // y for row blocks [begin, end). `product` multiplies the panels: add(panel, first, cells, sums)
  // adds the product of cells [first, first + cells) of the inputs to sums[rows()][kTileRows], of
  // at most kTileTokens rows, and settle(sums) leaves those of token i in row i.
  template <class Panel, class Product>
  static void tile_with(const CpuWeight& w, const CpuTokens& t, Product& product, int64_t begin,
                        int64_t end, const Panel& panels = {}) {
    constexpr int64_t kBlockCells = kInputs / Panel::kCellInputs;
    alignas(64) float panel[Panel::kPanelCells * kTileRows];
    alignas(64) float sums[kTileTokens * kTileRows];
    for (int64_t rb = begin; rb < end; rb += 2) {
      const int both = rb + 1 < end ? 2 : 1;  // with one, the panel holds it twice
      const int64_t second = rb + both - 1;
      std::memset(sums, 0, size_t(product.rows()) * kTileRows * 4);
      for (int64_t kb = 0; kb < w.k_blocks; kb += Panel::kPanelBlocks) {
        const int64_t left = w.k_blocks - kb,
                      some = left < Panel::kPanelBlocks ? left : Panel::kPanelBlocks;
        for (int64_t i = 0; i < some; ++i)
          panels.rebuild(w, rb, second, kb + i, panel + i * kBlockCells * kTileRows);
        prefetch(w, rb, kb + some, some);
        if (both == 2) prefetch(w, second, kb + some, some);
        product.add(panel, kb * kBlockCells, some * kBlockCells, sums);
      }
      product.settle(sums);
      for (int64_t j = 0; j < w.adapter_rank; j += kInputs) {
        const int64_t left = w.adapter_rank - j, length = left < kInputs ? left : kInputs;
        alignas(64) float tile[kInputs * kTileRows];
        for (int half = 0; half < 2; ++half)
          copy_panel(w.p, w.adapter_half, ((half ? second : rb) * w.adapter_rank + j) * kRows,
                     length, tile + half * kRows);
        multiply<Fp32Panel<V>>(tile, j, length, t.z, w.adapter_padded, t, sums);
      }
      for (int64_t i = 0; i < t.count; ++i)
        for (int half = 0; half < both; ++half) {
          float* const out = sums + i * kTileRows + half * kRows;
          if (w.bias)
            for (int h = 0; h < kRows; h += kLanes)
              V::store(out + h, V::load(out + h) + V::load(w.bias + (rb + half) * kRows + h));
          Stream<V>::store_rows(w, t, i, rb + half, out);
        }
    }
  }
  // x: the cells that Panel takes.
  template <class Panel>
  static void tile_of(const CpuWeight& w, const CpuTokens& t, const float* x, int64_t begin,
                      int64_t end) {
    Cells<Panel> product{t, x, w.k_blocks * kInputs / Panel::kCellInputs};
    tile_with<Panel>(w, t, product, begin, end);
  }
  static void tile(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
    tile_of<Fp32Panel<V>>(w, t, t.x, begin, end);
  }
};

}  // namespace
}  // namespace slab
