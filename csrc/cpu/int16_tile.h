// Many tokens with int8 activations, on AVX2: x and the weight as integers of 13 bits (int16.h).
#pragma once

#include "../int16.h"
#include "avx2.h"
#include "int8_tokens.h"
#include "tile.h"

namespace slab {
namespace {

// Steps below this one would have no inverse in fp32.
constexpr float kLeastStep = 0x1p-126f;

// A group as two cells of a pair each: integers from -4095 to 4095 of a strip's step.
struct PairStore {
  static constexpr int kGroupCells = kGroup / 2;
  Avx2::F inverse[2];  // of the strips' steps

  SLAB_INLINE __m256i integers(Avx2::F entries, int strip) const {
    return _mm256_cvtps_epi32(_mm256_mul_ps(entries, inverse[strip]));
  }
  SLAB_INLINE void group(const Avx2::F (&entries)[kGroup], int strip, float* to) const {
#pragma GCC unroll 2
    for (int i = 0; i < kGroup; i += 2, to += kTileRows) {
      const __m256i low = integers(entries[i], strip), high = integers(entries[i + 1], strip);
      _mm256_storeu_si256((__m256i*)to, _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA));
    }
  }
};

// A panel of pairs, behind which the steps of its rows stand.
struct Int16Panel {
  using F = Avx2::F;
  static constexpr int kCellInputs = 2, kPanelBlocks = 1;
  static constexpr int kCells = kInputs / kCellInputs, kPanelCells = kCells + 1;

  // The largest magnitudes of the values of the 16 rows under scale s, by strips. For int4 that is
  // what their bits allow.
  static SLAB_INLINE void largest_values(const CpuWeight& w, const uint8_t* values, int s,
                                         F (&most)[2]) {
    most[0] = most[1] = _mm256_set1_ps(8.0f);
    if (w.values == kInt4) return;
    __m256i bytes = _mm256_setzero_si256();  // [16 first, 16 second]
    const int groups = w.group_size / kGroup;
    for (int g = s * groups; g < (s + 1) * groups; ++g) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(values + 32 * g));
      bytes = _mm256_max_epu8(bytes, _mm256_abs_epi8(both));
    }
    const __m128i rows =
        _mm_max_epu8(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    most[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(rows));
    most[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(rows, 8)));
  }
  // The steps of the 16 rows of a block, by strips.
  static SLAB_INLINE void row_steps(const CpuWeight& w, int64_t rb, int64_t kb, F (&steps)[2]) {
    const F magnitude = (F)_mm256_set1_epi32(0x7FFFFFFF), part = _mm256_set1_ps(1.0f / kMost13);
    const uint8_t* const end = w.stream + (rb * w.k_blocks + kb + 1) * w.block_size;
    const uint8_t* const scales = end - scale_bytes(w.values, w.group_size);
    F pruned[2] = {Avx2::zero(), Avx2::zero()};
    steps[0] = steps[1] = _mm256_set1_ps(kLeastStep);
    for (int s = 0; s < kInputs / w.group_size; ++s) {
      F most[2];
      largest_values(w, scales - value_bytes(w.values), s, most);
      for (int h = 0; h < 2; ++h) {
        const F scale = Avx2::load_values<kBf16>(scales + 2 * (kRows * s + Avx2::kLanes * h));
        steps[h] = _mm256_max_ps(steps[h], _mm256_and_ps(magnitude, scale) * (most[h] * part));
      }
    }
    const F level = _mm256_set1_ps(level_unit(w.planes) * float(most_level(w.planes)));
    for (int64_t r = 0; r < w.rank; ++r) {
      const float most = float_of(largest_bits(w.v + (r * w.k_blocks + kb) * kInputs, kInputs));
      for (int h = 0; h < 2; ++h) {
        const F u = Avx2::load(w.u + (rb * w.rank + r) * kRows + h * Avx2::kLanes);
        pruned[h] = Avx2::fma(_mm256_and_ps(magnitude, u), _mm256_set1_ps(most), pruned[h]);
      }
    }
    for (int h = 0; h < 2; ++h) steps[h] = _mm256_max_ps(steps[h], pruned[h] * (level * part));
  }
  static void rebuild(const CpuWeight& w, int64_t first, int64_t second, int64_t kb, float* panel) {
    for (int half = 0; half < 2; ++half) {
      const int64_t rb = half ? second : first;
      Rebuild<Avx2, PairStore> pairs;
      F steps[2];
      row_steps(w, rb, kb, steps);
      for (int h = 0; h < 2; ++h) {
        Avx2::store(panel + kCells * kTileRows + half * kRows + h * Avx2::kLanes, steps[h]);
        pairs.store.inverse[h] = _mm256_set1_ps(1.0f) / steps[h];
      }
      if (w.values == kInt4)
        pairs.rebuild<kInt4>(w, rb, kb, panel + half * kRows);
      else
        pairs.rebuild<kInt8>(w, rb, kb, panel + half * kRows);
    }
  }
};

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
    const float* const row_steps = panel + Int16Panel::kCells * kTileRows;
    for (int c = 0; c < kTileRows; c += 2 * kLanes) {
      __m256i acc[kTokens][2];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
      for (int k = 0; k < Int16Panel::kCells; ++k) {
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
    const float* const steps = x.steps + first / Int16Panel::kCells * t.count;
    const TokenBlocks blocks(t.count, t.block_tokens);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t at = blocks.begin(b), tokens = blocks.begin(b + 1) - at;
      multiply_block<Avx2::kTokens>(panel, x.cells + at * all + first * tokens, tokens, steps + at,
                                    sums + at * kTileRows);
    }
  }
};

bool quantise_pairs(const float* x, int64_t k_blocks, int64_t token, int64_t M, int64_t place,
                    int64_t tokens, float* cells, float* steps) {
  bool finite = true;
  for (int64_t kb = 0; kb < k_blocks; ++kb, x += kInputs, cells += Int16Panel::kCells * tokens) {
    const uint32_t bits = largest_bits(x, kInputs);
    const bool numbers = bits < kInfinite;
    const float step = float_of(bits) / float(kMost13),
                used = step > kLeastStep ? step : kLeastStep, inverse = 1.0f / used;
    finite = finite && numbers;
    steps[kb * M + token] = numbers ? used : 0.0f;
    int16_t integers[kInputs];
    for (int i = 0; i < kInputs; ++i) integers[i] = numbers ? int16_t(nearest(x[i] * inverse)) : 0;
    for (int c = 0; c < Int16Panel::kCells; ++c)
      std::memcpy(cells + c * tokens + place, integers + 2 * c, 4);
  }
  return finite;
}

void tile_of_pairs(const CpuWeight& w, const CpuTokens& t, const Int16Tokens& x, int64_t begin,
                   int64_t end) {
  Int16Product product{t, x, w.k_blocks * Int16Panel::kCells};
  Tile<Avx2>::tile_with<Int16Panel>(w, t, product, begin, end);
}

}  // namespace
}  // namespace slab
