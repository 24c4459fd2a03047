// Panels of int8 weights (int8_panel.h) times tokens, written once over a vector type V.
//
// V has, beside what int8_panel.h asks for: dot(acc, weight, x), the products of each lane's four
// weights with four integers of x added to acc; kOffset, which is added to the integers of x that
// `many` reads; shifted(sum, shift), a sum of 16 bits times a shift, for `few`; top_byte(words,
// shift), the signed byte of each lane that a shift to the left brings to its top, for `many`;
// kPanelTokens, how many tokens its registers hold.
#pragma once

#include "../int8.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kPanelBytes = kRows * kInputs;

// kBlocks panels side by side, for tokens in pieces as `many` has them, else as `few` has them.
// kSpan: inputs that share a scale and a step, whose integers are summed: 64 or 32.
template <class V, int kBlocks, int kSpan, bool kMany>
struct PanelProduct {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes, kStrips = Stream<V>::kStrips;
  static constexpr int kSpans = kInputs / kSpan, kSpanBytes = kSpan * kRows;
  static constexpr bool kTotals = !kMany || V::kOffset != 0;
  using Scales = F[kSpans][kBlocks][kStrips];

  const uint8_t* panels;
  // Of the weights in each span, which the shifts of x meet in `few`; times -kOffset in `many`.
  I totals[kTotals ? kSpans : 1][kBlocks][kStrips];

  explicit SLAB_INLINE PanelProduct(const uint8_t* from) : panels(from) {
    if constexpr (kTotals) add_up();
  }
  SLAB_INLINE void add_up() {
    static constexpr int8_t ones[kGroup] = {1, 1, 1, 1};
    for (int p = 0; p < kSpans; ++p)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h) {
          const uint8_t* const at = panels + b * kPanelBytes + p * kSpanBytes + 4 * kLanes * h;
          I sum = I{};
          for (int g = 0; g < kSpan / kGroup; ++g)
            sum = V::dot(sum, V::load_words(at + 64 * g), ones);
          totals[p][b][h] = kMany ? I{} - sum * uint32_t(V::kOffset) : sum;
        }
  }

  // x W^T of the largest input of a piece for `many`, where that is in span p; in units of a scale.
  SLAB_INLINE F of_largest(const Int8Piece& piece, int p, int b, int h) const {
    const bool here = kSpan == kManyPiece || piece.place / kSpanBytes == p % 2;
    const float largest = here ? piece.largest : 0.0f;
    const uint8_t* const words =
        panels + p / (kManyPiece / kSpan) * kManyPiece * kRows + piece.place;
    const I weights = V::load_words(words + b * kPanelBytes + 4 * kLanes * h);
    return V::to_float(V::top_byte(weights, &piece.shift)) * V::broadcast(&largest);
  }

  // sums[i][16 b + row] += scales[span][b] x W^T of each span, for kTokens tokens from `token` on
  // of a block and term. Never inlined: all values and planes share one, whose sums are in
  // registers.
  template <int kTokens>
  __attribute__((noinline)) void multiply(const Int8Tokens& t, int64_t token, const Scales& scales,
                                          float* sums, int64_t stride) const {
    F y[kTokens][kBlocks][kStrips];
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h)
          y[i][b][h] = V::load(sums + i * stride + kRows * b + kLanes * h);
    int p = 0;
    do {
      const int64_t piece = token * kPieces + p;
      I acc[kTokens][kBlocks][kStrips];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h)
            if constexpr (!kMany)
              acc[i][b][h] = V::shifted(totals[p][b][h], t.shift + piece + i * kPieces);
            else if constexpr (kTotals)
              acc[i][b][h] = totals[p][b][h];
            else
              acc[i][b][h] = I{};
      const int8_t* x = t.x + token * kInputs + p * kSpan;
      const uint8_t* at = panels + p * kSpanBytes;
      const uint8_t* const end = at + kSpanBytes;
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
      const Int8Piece* own = nullptr;
      if constexpr (kMany) own = t.pieces + token * kManyPieces + p * kSpan / kManyPiece;
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h) {
            // This is of x's size. A scale times a step, which may overflow where the integers add
            // up to 0, is never formed.
            F of_x = V::to_float(acc[i][b][h]);
            if constexpr (kMany)
              of_x = V::fma(of_x, V::broadcast(&own[i * kManyPieces].step),
                            of_largest(own[i * kManyPieces], p, b, h));
            else
              of_x = of_x * V::broadcast(t.step + piece + i * kPieces);
            y[i][b][h] = V::fma(scales[p][b][h], of_x, y[i][b][h]);
          }
    } while (++p < kSpans);
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int h = 0; h < kStrips; ++h)
          V::store(sums + i * stride + kRows * b + kLanes * h, y[i][b][h]);
  }
  template <int kTokens>
  void multiply_some(const Int8Tokens& t, int64_t token, int64_t some, const Scales& scales,
                     float* sums, int64_t stride) const {
    if constexpr (kTokens > 0) {
      if (some == kTokens)
        multiply<kTokens>(t, token, scales, sums, stride);
      else
        multiply_some<kTokens - 1>(t, token, some, scales, sums, stride);
    }
  }
  // Of all tokens in a block of inputs of a term.
  void multiply_all(const Int8Tokens& t, int64_t term_block, const Scales& scales, float* sums,
                    int64_t stride) const {
    const int64_t from = term_block * t.count;
    int64_t some = 0;
    for (int64_t i = 0; i < t.count; i += some) {
      // The last ones in equal parts: a single token waits for its own sums.
      const int64_t left = t.count - i;
      some = left >= 2 * V::kPanelTokens ? V::kPanelTokens
             : left > V::kPanelTokens    ? (left + 1) / 2
                                         : left;
      multiply_some<V::kPanelTokens>(t, from + i, some, scales, sums + i * stride, stride);
    }
  }
};

}  // namespace
}  // namespace slab
