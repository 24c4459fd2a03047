// The products of the CPU backend are written once over a vector type V (a lane is an output row) and compiled once per
// instruction set: scalar.cpp, avx2.cpp and avx512.cpp define V, this table is what they export. V's constants:
//
//   kLookupBlocks, kPairBlocks   row blocks that share tables in `lookup`, with one token and with two
//   kPairRank      up to this rank two tokens go together; with AVX-512 and rank 4 that spills, and costs 1.4 x
//   kUnrollRank    up to this rank `lookup` takes four groups from a word by constant shifts. With AVX-512 the words
//                  otherwise travel to the stack and back (int4, rank 1: 1.24 x); where registers are few it costs
//   kLookupTokens, kTokens       `lookup` below so many tokens; tokens that `tile` multiplies at once
//
// Accumulation is fp32, in ascending input order within a lane, the same for every token count and range: a row of y
// depends on its own token only, and on which of the two products is used.
#pragma once

#include "lookup.h"
#include "tile.h"

namespace slab {
namespace {

template <class V>
constexpr CpuKernels kernel_table() {
  return CpuKernels{V::kName,          Stream<V>::widen, Stream<V>::multiply, Tile<V>::adapter_in,
                    Lookup<V>::lookup, Tile<V>::tile,    Tile<V>::dequantize, V::kLookupTokens};
}

}  // namespace
}  // namespace slab
