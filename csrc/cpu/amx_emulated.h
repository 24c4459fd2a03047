// The tile registers of AMX and their instructions in C++ with AVX-512, for tests on CPUs without
// tiles. They follow the operations in Intel's manual (volume 2, LDTILECFG, TILELOADD, TILESTORED
// and TDPBF16PS); where an instruction would be refused there, __builtin_trap ends the program.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "amx_config.h"

namespace slab {
namespace {

class EmulatedTiles {
 public:
  EmulatedTiles() { release(); }
  explicit EmulatedTiles(int tokens) { configure(TileConfig(tokens)); }

  template <int kTile>
  void load(const void* from, int64_t stride) {
    load(kTile, from, stride);
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    store(kTile, to, stride);
  }
  template <int kSums, int kX, int kWeight>
  void multiply() {
    multiply(kSums, kX, kWeight);
  }

  // ldtilecfg
  void configure(const TileConfig& config) {
    demand(config.palette == 1 && config.start_row == 0);
    for (uint8_t byte : config.reserved) demand(byte == 0);
    for (int i = 0; i < 16; ++i) {
      demand(config.rows[i] <= kMostTileRows && config.row_bytes[i] <= kMostRowBytes);
      demand((config.rows[i] == 0) == (config.row_bytes[i] == 0));
      demand(i < kTileRegisters || config.rows[i] == 0);
    }
    for (int i = 0; i < kTileRegisters; ++i) {
      rows_[i] = config.rows[i];
      bytes_[i] = config.row_bytes[i];
    }
    std::memset(data_, 0, sizeof data_);
  }
  // tilerelease
  void release() { std::memset(rows_, 0, sizeof rows_); }
  // tileloadd: what the rows do not fill is zero
  void load(int tile, const void* from, int64_t stride) {
    check(tile);
    std::memset(data_[tile], 0, sizeof data_[tile]);
    for (int r = 0; r < rows_[tile]; ++r)
      std::memcpy(data_[tile][r], static_cast<const uint8_t*>(from) + r * stride,
                  size_t(bytes_[tile]));
  }
  // tilestored
  void store(int tile, void* to, int64_t stride) const {
    check(tile);
    for (int r = 0; r < rows_[tile]; ++r)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, data_[tile][r], size_t(bytes_[tile]));
  }
  // tdpbf16ps
  void multiply(int sums, int x, int weight) {
    check(sums);
    check(x);
    check(weight);
    demand(sums != x && x != weight && sums != weight);
    demand(rows_[sums] == rows_[x] && bytes_[sums] == bytes_[weight]);
    demand(bytes_[x] == 4 * rows_[weight] && bytes_[x] % 4 == 0 && bytes_[sums] % 4 == 0);
    // The instruction reads no MXCSR: it rounds to nearest even, takes and leaves denormals as
    // zeros and raises nothing.
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9FC0);
    add_product(sums, x, weight);
    _mm_setcsr(before);
  }

 private:
  static void demand(bool holds) {
    if (!holds) __builtin_trap();
  }
  void check(int tile) const { demand(tile >= 0 && tile < kTileRegisters && rows_[tile] > 0); }

  // Even and odd inputs have a chain of fused multiply-adds each, which begins at zero. Both are
  // added up, and their sum is added to what was there. This is not inline, so that nothing of it
  // is computed before MXCSR is set.
  __attribute__((noinline)) void add_product(int sums, int x, int weight) {
    const __m512i high = _mm512_set1_epi32(int(0xFFFF0000u));
    const __mmask16 columns = __mmask16((1u << bytes_[sums] / 4) - 1);
    for (int m = 0; m < rows_[sums]; ++m) {
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int k = 0; k < bytes_[x] / 4; ++k) {
        uint32_t pair;
        std::memcpy(&pair, data_[x][m] + 4 * k, 4);
        const __m512i b = _mm512_loadu_si512(data_[weight][k]), a = _mm512_set1_epi32(int(pair));
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                               _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                              _mm512_castsi512_ps(_mm512_and_si512(b, high)), odd);
      }
      const __m512 old = _mm512_loadu_ps(data_[sums][m]);
      _mm512_storeu_ps(data_[sums][m], _mm512_maskz_add_ps(columns, old, _mm512_add_ps(even, odd)));
    }
  }

  alignas(64) uint8_t data_[kTileRegisters][kMostTileRows][kMostRowBytes];
  int rows_[kTileRegisters], bytes_[kTileRegisters];
};

}  // namespace
}  // namespace slab
