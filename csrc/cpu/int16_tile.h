// Many tokens with int8 activations, on AVX2: x and the weight as 16-bit integers (int16.h).
#pragma once

#include "int16_panel.h"
#include "tile.h"

namespace slab {
namespace {

// The product of panels for `tile_with`.
struct Int16Product {
  using F = Avx2::F;
  static constexpr int kLanes = Avx2::kLanes;
  const CpuTokens& t;
  const Int16Tokens& x;
  int64_t all;  // cells of a token

  int64_t rows() const { return t.count; }
  void settle(float*) {}

  // sums[kTokens][kTileRows] += steps of the tokens and of the rows times
  // cells[..][kTokens] panel[..][kTileRows]
  template <int kTokens>
  static void multiply_tokens(const float* panel, const float* cells, const float* steps,
                              float* sums) {
    const float* const row_steps = panel + kCellsOfBlock * kTileRows;
    for (int c = 0; c < kTileRows; c += 2 * kLanes) {
      __m256i acc[kTokens][2];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
      for (int k = 0; k < kCellsOfBlock; ++k) {
        const __m256i a = (__m256i)Avx2::load(panel + k * kTileRows + c),
                      b = (__m256i)Avx2::load(panel + k * kTileRows + c + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i) {
          const __m256i xk = (__m256i)Avx2::broadcast(cells + k * kTokens + i);
          acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(a, xk));
          acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(b, xk));
          // Without this GCC 12 multiplies for all tokens before it adds, and half of the sums
          // move to the stack and back: twice the time.
          __asm__ volatile("" : "+x"(acc[i][0]), "+x"(acc[i][1]));
        }
      }
      const F of_rows[2] = {Avx2::load(row_steps + c), Avx2::load(row_steps + c + kLanes)};
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) {
        const F step = Avx2::broadcast(steps + i);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          float* const sum = sums + i * kTileRows + c + j * kLanes;
          // The two steps are never multiplied with each other, since that may overflow where the
          // integers add up to 0.
          const F of_x = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[i][j]), step);
          Avx2::store(sum, Avx2::fma(of_x, of_rows[j], Avx2::load(sum)));
        }
      }
    }
  }
  template <int kTokens>
  static void multiply_block(const float* panel, const float* cells, int64_t tokens,
                             const float* steps, float* sums) {
    if constexpr (kTokens > 0) {
      if (tokens == kTokens)
        multiply_tokens<kTokens>(panel, cells, steps, sums);
      else
        multiply_block<kTokens - 1>(panel, cells, tokens, steps, sums);
    }
  }
  void add(const float* panel, int64_t first, int64_t, float* sums) {
    const float* const steps = x.steps + first / kCellsOfBlock * t.count;
    const TokenBlocks blocks(t.count, t.block_tokens);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t at = blocks.begin(b), tokens = blocks.begin(b + 1) - at;
      multiply_block<Avx2::kTokens>(panel, x.cells + at * all + first * tokens, tokens, steps + at,
                                    sums + at * kTileRows);
    }
  }
};

// The first input of a cell; its other input stands 4 behind it.
constexpr int first_input(int cell) { return cell / kGroup * 2 * kGroup + cell % kGroup; }

bool quantise_pairs(const float* x, int64_t k_blocks, int64_t token, int64_t M, int64_t place,
                    int64_t tokens, float* cells, float* steps) {
  bool finite = true;
  for (int64_t kb = 0; kb < k_blocks; ++kb, x += kInputs, cells += kCellsOfBlock * tokens) {
    const uint32_t bits = largest_bits(x, kInputs);
    const bool usable = bits < kTooLarge;
    const float most = usable ? float_of(bits) : 0.0f, lift = lift_of(most);
    const float factor = most > 0.0f ? float(kMostOfX) / (most * lift) : 0.0f;
    finite = finite && usable;
    steps[kb * M + token] = most * lift / float(kMostOfX) / lift;
    int32_t integers[kInputs];
    for (int i = 0; i < kInputs; ++i) integers[i] = usable ? nearest(x[i] * lift * factor) : 0;
    for (int c = 0; c < kCellsOfBlock; ++c) {
      const int i = first_input(c);
      const uint32_t cell = uint32_t(integers[i] & 0xFFFF) | uint32_t(integers[i + kGroup]) << 16;
      std::memcpy(cells + c * tokens + place, &cell, 4);
    }
  }
  return finite;
}

void quantise_factors(const CpuWeight& w, int16_t* v, float* most) {
  for (int64_t at = 0; at < w.rank * w.k_blocks; ++at) {
    const float* const from = w.v + at * kInputs;
    const float largest = float_of(largest_bits(from, kInputs));
    const float lift = lift_of(largest), factor = largest > 0 ? 32767.0f / (largest * lift) : 0.0f;
    most[at] = largest;
    for (int i = 0; i < kInputs; ++i) {
      const int cell = first_input(i / 2), input = cell + i % 2 * kGroup;
      v[at * kInputs + i] = int16_t(nearest(from[input] * lift * factor));
    }
  }
}

void tile_of_pairs(const CpuWeight& w, const CpuTokens& t, const Int16Tokens& x,
                   const Int16Factors& v, int64_t begin, int64_t end) {
  Int16Product product{t, x, w.k_blocks * kCellsOfBlock};
  Tile<Avx2>::tile_with(w, t, product, begin, end, Int16Panel{v});
}

}  // namespace
}  // namespace slab
