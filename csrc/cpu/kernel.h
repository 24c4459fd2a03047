// The products of the CPU backend are written once over a vector type V (a lane is an output row)
// and compiled once per instruction set: scalar.cpp, avx2.h and avx512.h define V, and
// kernel_table is what they export. V's constants are:
//
//   kLookupBlocks   row blocks that share tables in `lookup` with one token
//   kPairBlocks     the same with two tokens
//   kPairRank       Up to this rank two tokens go together. With AVX-512 and rank 4 that would
//                   spill and take 1.4 times as long.
//   kUnrollRank     Up to this rank `lookup` takes four groups from a word by constant shifts. With
//                   AVX-512 the words would otherwise travel to the stack and back (int4, rank 1:
//                   1.24 times as long); where registers are few, the shifts cost more.
//   kLookupTokens   `lookup` is used below so many tokens. With AVX2 `tile` takes .75 of its time
//                   at three tokens on a Zen 1; other CPUs with AVX2 were not timed there.
//   kRank0LookupTokens   the same with rank 0. On the Zen 1 `tile` takes 1.13 to 1.39 of
//                   the time that `lookup` takes for three tokens without signs.
//   kTokens         tokens that `tile` multiplies at once, at most
//   kMoved          whether `Places` (rebuild.h) moves its words, so that the answer is in bit 31
//   kSignedTable    whether the first entry of `Apart` is negated where r is set
//
// Sums are fp32, in ascending input order within a lane, the same for every token count and range:
// a row of y depends on its own token only, and on which of the two products is used.
#pragma once

#include "dequantize.h"
#include "descent.h"
#include "lookup.h"
#include "sweep.h"
#include "tile.h"
#include "tokens.h"

namespace slab {
namespace {

template <class V>
constexpr CpuKernels kernel_table() {
  return CpuKernels{V::kName,
                    Stream<V>::widen,
                    Stream<V>::multiply,
                    Tokens<V>::arrange,
                    Tile<V>::adapter_in,
                    Lookup<V>::lookup,
                    Tile<V>::tile,
                    nullptr,
                    Stream<V>::finish,
                    Dequantize<V>::dequantize,
                    V::kLookupTokens,
                    V::kRank0LookupTokens,
                    0,
                    V::kTokens,
                    V::kTokens,
                    Descent<V>::descend,
                    Sweep<V>::sweep};
}

}  // namespace
}  // namespace slab
