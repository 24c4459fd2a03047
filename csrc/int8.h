// The products with int8 activations, for int8 and int4 values: what the bindings call, beside
// launch.h. They read the same prepared stream as the exact products.
//
// x becomes integers in pieces of its inputs, and there are two products (and another one for many
// tokens with AVX2, which int16.h describes):
//
//   few   Kept values times x, and the signs or levels of pruned positions times x v_r, each summed
//         in int32 without an error. Nothing but x and x v_r is rounded. A piece has 32 inputs, a
//         step and a shift: x is nearly the step times (an integer from -127 to 127 plus the
//         shift). These 255 numbers cover what lies between the smallest and the largest input of
//         the piece, with 0 among them. Where one input is far larger than the others, as language
//         models have many, that halves the step which integers symmetric about 0 would need. The
//         pieces of x v_r, for every rank r, are symmetric: their shift is 0. With one plane any
//         two integers of a group also add up to at most 127 in magnitude, since `few` holds
//         such sums in 8 bits.
//   many  Kept values and the sign term become one int8 weight, a panel of 16 rows x 128 inputs
//         that all tokens share. A kept value is exact, 16 q of int4 or q of int8, in units of
//         scale / 16 or scale. A pruned one is u v times its sign or level in the same unit,
//         rounded to an integer. Where it could exceed 126 units for a row and block, the row's
//         sign term goes into a second panel with a unit of its own, so nothing saturates. So it
//         does beside int8 values where it stays below 8 units: their unit is a whole scale, and
//         one that a large value has made coarse would round the sign term away. A piece has 64
//         inputs. The largest of them is multiplied as it is, in fp32. Each other one becomes a
//         step times an integer from -127 to 127; the second largest decides the step.
//
// Sums are int32 within a piece, or within the part of it that a scale covers, and fp32 over
// pieces, in ascending input order: a row of y depends on its own token only, and on which of the
// two products is used. The shift of a piece meets the sum of a row's weights there, which has 16
// bits.
//
// Why `many` sets an input apart: single inputs of language models are far larger than all others,
// and without them the step is that of the rest. A shift would do the same less well, and it would
// have to meet the sum of the weights once more for each token and piece.
#pragma once

#include "int16.h"

namespace slab {

constexpr int kPiece = 32;  // inputs of a piece for `few`; no scale covers fewer
constexpr int kPieces = kInputs / kPiece;
constexpr int kManyPiece = 64;  // and for `many`
constexpr int kManyPieces = kInputs / kManyPiece;
constexpr int kFewAtOnce = 16;    // tokens of one call of `few`
constexpr int kManyAtOnce = 256;  // and of `many`, whose fp32 sums, 32 KB, live on its stack
constexpr int kManyRank = 16;     // `many` takes weights up to this rank
constexpr int kMostUnits = 126;   // of a pruned entry in a panel
// Where a row's largest pruned entry has fewer, it is not rounded in units of the values. An int4
// value's unit is a sixteenth of the step that its value was rounded by.
constexpr int least_units(int values) { return values == kInt8 ? 8 : 0; }
// A pruned entry is computed as an integer in units of 1/256 of a panel's unit.
constexpr int kFraction = 256;

// The largest integer of a level, and the factor of u v that it stands for times that integer.
constexpr int most_level(int planes) { return planes > 1 ? (1 << planes) - 1 : 1; }
constexpr float level_unit(int planes) { return planes == 3 ? 0.25f : planes == 2 ? 0.5f : 1.0f; }

// A piece of a token for `many`.
struct Int8Piece {
  float step;     // of the integers
  float largest;  // the input of largest magnitude, whose integer is 0
  // Where the largest one's weights stand in a panel's part of the piece, as the kernels have it:
  // the bytes before the words that hold them, and the shift that brings them to the words' top.
  int32_t place, shift;
  // What sums over either half of the piece begin with: less than 0 by the total of its integers
  // times what the kernels add to every weight.
  int32_t start[2];
};

// The quantised tokens of one call. Term 0 is x, term 1 + r is x v_r, which `few` alone reads;
// terms are `terms` in number. Index [term][block][token] is (term k_blocks + block) count + token.
struct Int8Tokens {
  int64_t count, terms;
  int8_t* x;  // [terms][k_blocks][count][128]
  // Read by `few`. [terms][k_blocks][count][4]: x is nearly step (its integer + shift). Where
  // kernels read the integers plus 128, `shift` is less by that. It has 16 bits, with zeros above.
  float* step;
  int32_t* shift;
  uint8_t* tables;    // [terms][k_blocks][count][1024] or null: see int8_tables.h
  uint8_t* finite;    // [terms][count]: 0 where a token has NaN or numbers from 2^108 on
  Int8Piece* pieces;  // [k_blocks][count][2], read by `many`; null for `few`
  // Read by `many`.
  // [R][k_blocks][128]: V over its largest magnitude in the block, times 32767; the inputs of a
  // group in the order 0 2 1 3.
  int16_t* v;
  float* v_most;  // [R][k_blocks]: that magnitude
};

// What a product does with its sums.
struct Int8End {
  const CpuTokens* tokens;
  // As in CpuKernels.
  void (*finish)(const CpuWeight& w, const CpuTokens& t, int64_t row_block, int64_t token,
                 int64_t count, const float* sums, int64_t stride);
};

using Int8Product = void (*)(const CpuWeight& w, const Int8Tokens& t, const Int8End& end,
                             int64_t first, int64_t last);

// One table per instruction set; ranges of row blocks begin at even numbers.
struct Int8Kernels {
  const char* name;
  bool reads_tables;  // whether `few` does
  // Quantises term `term` of a token, whose x is a row of k_blocks * 128 numbers.
  void (*quantise)(const CpuWeight& w, const Int8Tokens& t, const float* x, int64_t term,
                   int64_t token);
  // Writes t.v and t.v_most.
  void (*quantise_v)(const CpuWeight& w, const Int8Tokens& t);
  Int8Product few;
  // For many tokens either of these, the other one is null. `wide` has 16-bit integers (int16.h).
  Int8Product many;
  const Int16Kernels* wide;
  // `few` runs up to so many tokens, and while tokens times 1 + rank are at most `few_terms`: it
  // multiplies x v_r once for each rank. It rounds less than `many`, and more than `wide`.
  int few_tokens, few_terms;
  // What runs above that: the product for many tokens, or else the exact one, which is faster
  // there. All were measured on AMD EPYCs (Zen 4, for AVX2 Zen 3), one thread, ranks 0 to 4, int4
  // and int8.
  bool runs_many;
};

const Int8Kernels* int8_kernels_scalar();
const Int8Kernels* int8_kernels_avx2();  // null when built without
const Int8Kernels* int8_kernels_vnni();  // null when built without

// The kernels that go with an instruction set that was chosen. AVX-512 without VNNI and VBMI gets
// the scalar ones, which never run by themselves: `few` of AVX2 was not compared there with the
// exact product of AVX-512, which is faster than that of AVX2.
const Int8Kernels& int8_kernels(const CpuKernels& chosen);

}  // namespace slab
