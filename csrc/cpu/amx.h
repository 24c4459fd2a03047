// Many tokens of bf16 with AMX: tile registers multiply the panel of bf16 pairs.
//
// A tile register holds up to 16 rows of 64 bytes. One instruction, tdpbf16ps, adds to a tile of
// sums, [tokens][16 output rows] of fp32, the product of a tile of x, [tokens][32 inputs] of bf16,
// and of a tile of the weight, [16 pairs of inputs][16 output rows][2] of bf16. The last is half of
// 16 cells of a panel as it stands, and the sums are those of `tile` as they stand. x is put into
// tiles, [cells / 16][tokens][16 cells], by Tokens::arrange_tiles.
//
// There are eight registers. Four hold the sums of two blocks of tokens and two row blocks, two x
// and two the weight, so that each tile that is loaded is multiplied twice.
//
// `Tiles` is the registers: those of the CPU (avx512_amx.cpp) or emulated ones (amx_emulated.h). An
// object of it configures those of sums and of x to as many rows as the largest block of tokens
// has. A block that has one token fewer is multiplied as if it had that one: the row that is read
// for it is the next in memory, which exists because the last block is a largest one, and its sums
// are left out.
#pragma once

#include "avx512.h"
#include "bf16_panel.h"
#include "tile.h"
#include "tokens.h"

namespace slab {
namespace {

constexpr int kTileCells = 16;  // of a row of a tile

template <class Tiles>
class TileProduct {
 public:
  TileProduct(const CpuTokens& t, int64_t all)
      : t_(t), all_(all), blocks_(t.count, t.pair_tokens), tiles_(int(blocks_.largest())) {}

  // Every block has `largest` rows of sums. ceil(M / 16) blocks of at most 16 fit kTileTokens.
  int64_t rows() const { return blocks_.count * blocks_.largest(); }

  void add(const float* panel, int64_t first, int64_t cells, float* sums) {
    for (int64_t b = 0; b < blocks_.count; b += 2)
      if (b + 1 < blocks_.count)
        multiply<true>(panel, cells, block(b, first, sums), block(b + 1, first, sums));
      else
        multiply<false>(panel, cells, block(b, first, sums), block(b, first, sums));
  }

  void settle(float* sums) const {
    for (int64_t b = 0; b < blocks_.count; ++b)
      std::memmove(sums + blocks_.begin(b) * kTileRows, sums + b * blocks_.largest() * kTileRows,
                   size_t(blocks_.begin(b + 1) - blocks_.begin(b)) * kTileRows * 4);
  }

 private:
  struct Block {
    const float* x;  // from the first cell of the panel on
    int64_t tokens;
    float* sums;
  };
  Block block(int64_t b, int64_t first, float* sums) const {
    const int64_t at = blocks_.begin(b), tokens = blocks_.begin(b + 1) - at;
    return {t_.pairs + at * all_ + first * tokens, tokens,
            sums + b * blocks_.largest() * kTileRows};
  }

  // Adds the product of a panel and of block `one`, and with kBoth of block `two` as well.
  template <bool kBoth>
  void multiply(const float* panel, int64_t cells, const Block& one, const Block& two) {
    constexpr int64_t kSums = 4 * kTileRows, kX = 4 * kTileCells;  // bytes from row to row
    tiles_.template load<0>(one.sums, kSums);
    tiles_.template load<1>(one.sums + kRows, kSums);
    if constexpr (kBoth) {
      tiles_.template load<2>(two.sums, kSums);
      tiles_.template load<3>(two.sums + kRows, kSums);
    }
    for (int64_t c = 0; c < cells; c += kTileCells) {
      tiles_.template load<4>(one.x + c * one.tokens, kX);
      tiles_.template load<6>(panel + c * kTileRows, kSums);
      tiles_.template load<7>(panel + c * kTileRows + kRows, kSums);
      tiles_.template multiply<0, 4, 6>();
      tiles_.template multiply<1, 4, 7>();
      if constexpr (kBoth) {
        tiles_.template load<5>(two.x + c * two.tokens, kX);
        tiles_.template multiply<2, 5, 6>();
        tiles_.template multiply<3, 5, 7>();
      }
    }
    tiles_.template store<0>(one.sums, kSums);
    tiles_.template store<1>(one.sums + kRows, kSums);
    if constexpr (kBoth) {
      tiles_.template store<2>(two.sums, kSums);
      tiles_.template store<3>(two.sums + kRows, kSums);
    }
  }

  const CpuTokens& t_;
  const int64_t all_;  // cells of a token
  const TokenBlocks blocks_;
  Tiles tiles_;
};

template <class Tiles>
void multiply_tiles(const CpuWeight& w, const CpuTokens& t, int64_t begin, int64_t end) {
  TileProduct<Tiles> product(t, w.k_blocks * kInputs / Bf16Panel::kCellInputs);
  Tile<Avx512>::tile_with<Bf16Panel>(w, t, product, begin, end);
}

// The kernels of avx512_bf16 with another product of many tokens. From how many tokens on it is
// faster than `lookup` has not been measured; it begins where that of bf16 pairs does.
template <class Tiles>
CpuKernels tile_kernels(const char* name) {
  CpuKernels found = *cpu_kernels_avx512_bf16();
  found.name = name;
  found.arrange = Tokens<Avx512>::arrange_tiles;
  found.tile_bf16 = multiply_tiles<Tiles>;
  found.pair_tokens = kTileCells;
  return found;
}

}  // namespace
}  // namespace slab
