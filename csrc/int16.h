// The product for many tokens with int8 activations where bytes cannot be multiplied well. AVX2
// adds two products of bytes in 16 bits, where they saturate unless one factor is cut to 7 bits. It
// adds two products of 16-bit integers in 32 bits (vpmaddwd), and they take half the room of fp32:
// so there x and the weight become integers of 13 bits, which round much less than 8 do.
//
// Both are integers times a step, in blocks of 128 inputs. The step of a token is its largest
// magnitude in the block over 4095. That of a row of the weight is a bound of its magnitudes there
// over 4088: the largest kept one (of int4 values 8 scales), or the sign term with the largest v of
// every rank; steps of the weight below 2^-120 become 2^-120. 8 times 511 is 4088, so int4 values
// are exact where a block has one scale and the sign term is not larger. Nothing saturates, and the
// sum of a block, of 128 products below 2^24, stays below 2^31. Blocks are added in fp32, in
// ascending order: a row of y depends on its own token only.
//
// Rounding changes an entry of x by at most half a step, and a kept value by at most one. It
// changes a pruned entry by at most 0.7 + L R / 8 steps, where L is the largest level: 1, 3 or 7.
// Of that, half a step comes from the last rounding and 1.5 eighths of a step from v; for each rank
// L/2 eighths come from u and as many from its product with v. Where the largest x of a block is
// below 5e-35, its step is no normal number of fp32 any more, and x is rounded by more.
#pragma once

#include "launch.h"

namespace slab {

constexpr int kMostOfX = 4095, kMostOfWeight = 4088;

// The quantised tokens of a call, in the blocks of tokens that `tile` takes (launch.h).
struct Int16Tokens {
  // [cells][tokens of the block]; a cell holds inputs 8 j + p (in its low half) and 8 j + 4 + p.
  const float* cells;
  const float* steps;  // [k_blocks][M]
};
// V of a weight.
struct Int16Factors {
  const int16_t* v;   // [R][k_blocks * 64 cells][2]: over its largest magnitude, times 32767
  const float* most;  // [R][k_blocks]: that magnitude
};

struct Int16Kernels {
  // Writes the cells and steps of one token, number `token` of the M of a call and `place` of the
  // `tokens` of its block, whose cells begin at `cells`. x: k_blocks * 128 numbers. Returns whether
  // all are below 2^108; a block where they are not becomes zeros.
  bool (*quantise)(const float* x, int64_t k_blocks, int64_t token, int64_t M, int64_t place,
                   int64_t tokens, float* cells, float* steps);
  // Writes what Int16Factors has.
  void (*quantise_factors)(const CpuWeight& w, int16_t* v, float* most);
  // y for row blocks [begin, end): at most kTileTokens tokens, ranks up to kManyRank, int8 and
  // int4 values.
  // t.x is not read.
  void (*tile)(const CpuWeight& w, const CpuTokens& t, const Int16Tokens& x,
               const Int16Factors& factors, int64_t begin, int64_t end);
};

}  // namespace slab
