// Panels of int8 weights (int8_panel.h) times tokens, written once over a vector type V.
//
// V has, beside what int8_panel.h asks for: dot(acc, weight, x), the products of each lane's four
// weights with four integers of x added to acc; top_byte(words, shift), the weight of each lane
// that a shift to the left brings to its top; kPanelTokens, how many tokens its registers hold.
#pragma once

#include "../int8.h"
#include "stream.h"

namespace slab {
namespace {

constexpr int kPanelBytes = kRows * kInputs;

// kBlocks panels side by side, for tokens in pieces as `many` has them.
// kSpan: inputs that share a step, whose integers are summed: 64 or 32.
// kScaled: inputs that share a scale, whose spans are summed: 128, 64 or 32.
template <class V, int kBlocks, int kSpan, int kScaled>
struct PanelProduct {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes, kStrips = Stream<V>::kStrips;
  static constexpr int kSpanBytes = kSpan * kRows;
  static constexpr int kScales = kInputs / kScaled;
  using Scales = F[kScales][kBlocks][kStrips];

  const uint8_t* panels;

  // What the sums of span p begin with.
  static SLAB_INLINE I start(const Int8Piece& piece, int p) {
    if constexpr (kSpan == kManyPiece)
      return V::broadcast_int(piece.start) + V::broadcast_int(piece.start + 1);
    else
      return V::broadcast_int(piece.start + p % 2);
  }

  // x W^T of the largest input of a piece, where that is in span p; in units of a scale.
  SLAB_INLINE F of_largest(const Int8Piece& piece, int p, int b, int h, F sum) const {
    const bool here = kSpan == kManyPiece || piece.place / kSpanBytes == p % 2;
    const float largest = here ? piece.largest : 0.0f;
    const uint8_t* const words =
        panels + p / (kManyPiece / kSpan) * kManyPiece * kRows + piece.place;
    const I weights = V::load_words(words + b * kPanelBytes + 4 * kLanes * h);
    return V::fma(V::to_float(V::top_byte(weights, &piece.shift)), V::broadcast(&largest), sum);
  }

  // sums[i][16 b + row] += scales[scale][b] x W^T of the spans under each scale, for kTokens tokens
  // from `token` on of a block. Never inlined: all values and planes share one, whose sums
  // are in registers.
  template <int kTokens>
  __attribute__((noinline)) void multiply(const Int8Tokens& t, int64_t token, const Scales& scales,
                                          float* sums, int64_t stride) const {
    int p = 0;
#pragma GCC unroll 1
    for (int s = 0; s < kScales; ++s) {
      const int last = p + kScaled / kSpan;
      F of_x[kTokens][kBlocks][kStrips];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h) of_x[i][b][h] = V::zero();
      do {
        const Int8Piece* const own = t.pieces + token * kManyPieces + p * kSpan / kManyPiece;
        I acc[kTokens][kBlocks][kStrips];
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
            for (int h = 0; h < kStrips; ++h) acc[i][b][h] = start(own[i * kManyPieces], p);
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
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
            for (int h = 0; h < kStrips; ++h) {
              // This is of x's size. A scale times a step, which may overflow where the integers
              // add up to 0, is never formed.
              const Int8Piece& piece = own[i * kManyPieces];
              const F sum =
                  V::fma(V::to_float(acc[i][b][h]), V::broadcast(&piece.step), of_x[i][b][h]);
              of_x[i][b][h] = of_largest(piece, p, b, h, sum);
            }
      } while (++p < last);
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
          for (int h = 0; h < kStrips; ++h) {
            float* const sum = sums + i * stride + kRows * b + kLanes * h;
            V::store(sum, V::fma(scales[s][b][h], of_x[i][b][h], V::load(sum)));
          }
    }
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
  // Of all tokens in a block of inputs.
  void multiply_all(const Int8Tokens& t, int64_t kb, const Scales& scales, float* sums,
                    int64_t stride) const {
    const int64_t from = kb * t.count;
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
