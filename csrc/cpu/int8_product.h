// Panels of int8 weights (int8_panel.h) times tokens, written once over a vector type V.
//
// V has, beside what int8_panel.h asks for: shifted(sum, shift), a sum of 16 bits times a shift;
// dot(acc, weight, x), the products of each lane's four weights with four integers of x added to
// acc; kPanelTokens, how many tokens its registers hold.
#pragma once

#include "../int8.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kPanelBytes = kRows * kInputs, kPieceBytes = kRows * kPiece;

// kBlocks panels side by side.
template <class V, int kBlocks>
struct PanelProduct {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes, kStrips = Stream<V>::kStrips;

  const uint8_t* panels;
  I totals[kPieces][kBlocks][kStrips];  // of the weights in each piece, which the shifts of x meet

  explicit SLAB_INLINE PanelProduct(const uint8_t* from) : panels(from) {
    static constexpr int8_t ones[kGroup] = {1, 1, 1, 1};
    for (int p = 0; p < kPieces; ++p)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h) {
          const uint8_t* const at = panels + b * kPanelBytes + p * kPieceBytes + 4 * kLanes * h;
          I sum = I{};
          for (int g = 0; g < kPiece / kGroup; ++g)
            sum = V::dot(sum, V::load_words(at + 64 * g), ones);
          totals[p][b][h] = sum;
        }
  }

  // sums[i][16 b + row] += scale[b] x W^T of pieces [first, last), for kTokens tokens from `token`
  // on of a block and term. Never inlined: all values and planes share one, whose sums are in
  // registers.
  template <int kTokens>
  __attribute__((noinline)) void multiply(int first, int last, const Int8Tokens& t, int64_t token,
                                          const F (*scale)[kStrips], float* sums,
                                          int64_t stride) const {
    F of_x[kTokens][kBlocks][kStrips];  // in units of the scale
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h) of_x[i][b][h] = V::zero();
    int p = first;
    do {
      const int64_t piece = token * kPieces + p;
      I acc[kTokens][kBlocks][kStrips];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h)
            acc[i][b][h] = V::shifted(totals[p][b][h], t.shift + piece + i * kPieces);
      const int8_t* x = t.x + piece * kPiece;
      const uint8_t* at = panels + p * kPieceBytes;
      const uint8_t* const end = at + kPieceBytes;
      do {  // With a loop that may not run at all, GCC 12 stores every sum in every round.
        I weight[kBlocks][kStrips];
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h)
            weight[b][h] = V::load_words(at + b * kPanelBytes + 4 * kLanes * h);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
            for (int h = 0; h < kStrips; ++h)
              acc[i][b][h] = V::dot(acc[i][b][h], weight[b][h], x + i * kInputs);
        x += kGroup;
        at += 64;
      } while (at < end);
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h)
            of_x[i][b][h] = V::fma(V::to_float(acc[i][b][h]),
                                   V::broadcast(t.step + piece + i * kPieces), of_x[i][b][h]);
    } while (++p < last);
    // The sums are of x's size. A scale times a step, which may overflow where the integers add up
    // to 0, is never formed.
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h) {
          float* const y = sums + i * stride + kRows * b + kLanes * h;
          V::store(y, V::fma(scale[b][h], of_x[i][b][h], V::load(y)));
        }
  }
  template <int kTokens>
  void multiply_some(int first, int last, const Int8Tokens& t, int64_t token, int64_t some,
                     const F (*scale)[kStrips], float* sums, int64_t stride) const {
    if constexpr (kTokens > 0) {
      if (some == kTokens)
        multiply<kTokens>(first, last, t, token, scale, sums, stride);
      else
        multiply_some<kTokens - 1>(first, last, t, token, some, scale, sums, stride);
    }
  }
  // Of all tokens, in the pieces [first, first + pieces) of a block of inputs of a term, which
  // share a scale.
  void multiply_all(int first, int pieces, const Int8Tokens& t, int64_t term_block,
                    const F (*scale)[kStrips], float* sums, int64_t stride) const {
    const int last = first + pieces;
    const int64_t from = term_block * t.count;
    int64_t some = 0;
    for (int64_t i = 0; i < t.count; i += some) {
      // The last ones in equal parts: a single token waits for its own sums.
      const int64_t left = t.count - i;
      some = left >= 2 * V::kPanelTokens ? V::kPanelTokens
             : left > V::kPanelTokens    ? (left + 1) / 2
                                         : left;
      multiply_some<V::kPanelTokens>(first, last, t, from + i, some, scale, sums + i * stride,
                                     stride);
    }
  }
};

}  // namespace
}  // namespace slab
